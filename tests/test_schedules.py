"""utils/schedules.py against the reference, and the landmarks that a recipe relies on."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import schedules as reference
from utils.schedules import cosine_momentum, warmup_cosine

few = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, int]:
    """A step, all steps and the warm-up steps of a run."""
    total = draw(st.integers(1, 10**6))
    return draw(st.integers(0, total - 1)), total, draw(st.integers(0, total - 1))


@given(run=runs(), peak=st.floats(1e-4, 10), multiplier=st.sampled_from([1, 100, 1e4]), final=st.floats(0, 1e-5))
@few
def test_learning_rate_is_that_of_the_reference(
    run: tuple[int, int, int], peak: float, multiplier: float, final: float
) -> None:
    step, total, warmup = run
    expected = reference.warmup_cosine(step, total, peak, warmup, multiplier, final)
    assert warmup_cosine(step, total, peak, warmup, multiplier, final) == pytest.approx(expected, rel=1e-9)
    published = reference.warmup_cosine(step, total, peak, warmup)
    assert warmup_cosine(step, total, peak, warmup) == pytest.approx(published, rel=1e-9)


@given(run=runs(), start=st.floats(0, 1), end=st.floats(0, 1))
@few
def test_teacher_momentum_is_that_of_the_reference(run: tuple[int, int, int], start: float, end: float) -> None:
    step, total, _ = run
    expected = reference.cosine_momentum(step, total, start, end)
    assert cosine_momentum(step, total, start, end) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    published = reference.cosine_momentum(step, total, start)
    assert cosine_momentum(step, total, start) == pytest.approx(published, rel=1e-9, abs=1e-12)


def test_learning_rate_starts_at_a_hundredth_peaks_after_the_warm_up_and_ends_at_a_millionth() -> None:
    assert warmup_cosine(0, 1000, 2.0, 100) == pytest.approx(0.02)
    assert warmup_cosine(50, 1000, 2.0, 100) == pytest.approx(0.02 * 50.5)
    assert warmup_cosine(100, 1000, 2.0, 100) == pytest.approx(2.0)
    assert warmup_cosine(550, 1000, 2.0, 100) == pytest.approx((2.0 + 1e-6) / 2)
    assert warmup_cosine(1000, 1000, 2.0, 100) == pytest.approx(1e-6)


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert warmup_cosine(0, 10, 2.0, 0) == pytest.approx(2.0)


def test_learning_rate_rises_in_the_warm_up_and_falls_afterwards() -> None:
    rates = [warmup_cosine(step, 60, 1.6, 7) for step in range(60)]
    assert all(a < b for a, b in pairwise(rates[:8]))
    assert all(a > b for a, b in pairwise(rates[7:]))


def test_teacher_momentum_rises_from_its_start_to_one() -> None:
    momenta = [cosine_momentum(step, 50, 0.99) for step in range(51)]
    assert momenta[0] == pytest.approx(0.99)
    assert momenta[25] == pytest.approx(0.995)
    assert momenta[50] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(momenta))
