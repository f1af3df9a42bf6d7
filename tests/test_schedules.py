"""utils/schedules.py, and the plan of a run that calls it, against the reference."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import main_pretrain
from tests.reference import schedules as reference
from utils.config import TrainingPlan, make_plan
from utils.schedules import epoch_cosine, half_cosine, warmup_cosine

CLOSE = {"rel": 1e-9, "abs": 1e-12}


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw a step, the total number of steps, and the number of warm-up steps."""
    total = draw(st.integers(1, 10**6))
    return draw(st.integers(0, total - 1)), total, draw(st.integers(0, total - 1))


@given(steps(), st.floats(1e-4, 10), st.sampled_from([1, 100, 1e4, math.inf]))
def test_warmup_cosine_matches_the_reference(run: tuple[int, int, int], peak: float, multiplier: float) -> None:
    step, total, warmup = run
    expected = reference.warmup_cosine(step, total, peak, warmup, start=peak / multiplier)
    assert warmup_cosine(step, total, peak, warmup, multiplier) == pytest.approx(expected, **CLOSE)


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 20), st.floats(0, 0.999), st.sampled_from([100, 1e4]))
def test_epoch_cosine_matches_the_reference(
    steps_per_epoch: int, epochs: int, warmup_epochs: int, progress: float, multiplier: float
) -> None:
    total, warmup = steps_per_epoch * epochs, steps_per_epoch * warmup_epochs
    step = int(progress * total)
    expected = reference.epoch_cosine(step, steps_per_epoch, epochs, 4.8, warmup, 1 / multiplier)
    assert epoch_cosine(step, total, 4.8, warmup, steps_per_epoch, multiplier) == pytest.approx(expected, **CLOSE)


@given(steps(), st.floats(0, 1), st.floats(0, 1))
def test_half_cosine_matches_the_reference(run: tuple[int, int, int], start: float, end: float) -> None:
    step, total, _ = run
    expected = reference.cosine(step, total, start, end)
    assert half_cosine(step, total, start, end) == pytest.approx(expected, **CLOSE)


def plan(*flags: str) -> TrainingPlan:
    """Make the plan of 10 epochs of 4 steps."""
    args = main_pretrain.parse_args(["--batch-size", "256", "--epochs", "10", *flags])
    return make_plan(args, num_images=1100, world_size=2)


def test_plan_of_slotcon() -> None:
    slotcon = plan("--base-lr", "2", "--warmup-epoch", "3")
    assert (slotcon.steps_per_epoch, slotcon.total_steps, slotcon.warmup_steps, slotcon.peak_lr) == (4, 40, 12, 2)
    for step in range(40):
        assert slotcon.lr_at(step) == pytest.approx(reference.warmup_cosine(step, 40, 2.0, 12, start=0.02))
        assert slotcon.teacher_momentum_at(step) == pytest.approx(reference.cosine(step, 40, 0.99, 1))
        assert slotcon.weight_decay_at(step) == 1e-5
        assert slotcon.epoch(step) == step / 4
    rates = [slotcon.lr_at(step) for step in range(40)]
    assert all(a < b for a, b in pairwise(rates[:13]))
    assert all(a > b for a, b in pairwise(rates[12:]))


def test_plan_with_warm_up_from_zero_and_scheduled_weight_decay() -> None:
    flags = "--base-lr 5e-4 --warmup-epoch 2 --warmup-multiplier inf --weight-decay 0.04 --weight-decay-end 0.4"
    gtsa = plan(*flags.split(), "--teacher-momentum", "0.996", "--accum-steps", "2")
    assert (gtsa.steps_per_epoch, gtsa.effective_batch, gtsa.peak_lr) == (2, 512, 1e-3)
    assert gtsa.lr_at(0) == 0
    for step in range(20):
        assert gtsa.lr_at(step) == pytest.approx(reference.warmup_cosine(step, 20, 1e-3, 4, start=0))
        assert gtsa.weight_decay_at(step) == pytest.approx(reference.cosine(step, 20, 0.04, 0.4))
        assert gtsa.teacher_momentum_at(step) == pytest.approx(reference.cosine(step, 20, 0.996, 1))


def test_plan_with_a_learning_rate_by_epoch() -> None:
    triplet = plan("--lr-schedule", "epoch-cosine", "--base-lr", "4.8", "--warmup-multiplier", "1e4")
    for step in range(40):
        assert triplet.lr_at(step) == pytest.approx(reference.epoch_cosine(step, 4, 10, 4.8, 20))
    assert triplet.lr_at(24) == triplet.lr_at(27) > triplet.lr_at(28)
