"""Slot statistics against the float64 reference, and the warnings of a collapse within an epoch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import main_pretrain
from models import build_method
from models.slot_statistics import POSITIONS, SlotMonitor, slot_statistics
from tests.reference import slot_statistics as reference

HEALTHY = {"assignment_entropy": 0.5, "largest": 0.3, "prototypes_used": 1.0, "positives": 20.0}


@given(seed=st.integers(0, 2**31), count=st.integers(2, 9), temperature=st.sampled_from([0.02, 0.07, 1.0]))
@settings(max_examples=15)
def test_slot_statistics_match_reference(seed: int, count: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = ([rng.uniform(-1, 1, (3, count, 2, 3)) for _ in range(2)] for _ in range(2))
    prototypes, center = rng.normal(size=(count, 5)), rng.normal(0, 0.1, count)
    expected = reference.slot_statistics(student, teacher, prototypes, center, temperature)
    tensors = ([torch.from_numpy(view) for view in views] for views in (student, teacher))
    statistics = slot_statistics(*tensors, torch.from_numpy(prototypes), torch.from_numpy(center)[None], temperature)
    assert statistics.keys() == expected.keys()
    for name, value in expected.items():
        rounding = 1e-6 if name == "slots/per_image" else 1e-12  # a mean of counts, in float32
        np.testing.assert_allclose(statistics[name], value, rtol=rounding, atol=1e-12, err_msg=name)


def positions(*slots: int) -> dict[str, Tensor]:
    """The outputs of a step whose positions were won by these of ten prototypes."""
    return {POSITIONS: torch.bincount(torch.tensor(slots), minlength=10).float()}


def test_monitor_reports_prototypes_used_in_the_last_epoch_and_the_largest_slot_since_the_last_report() -> None:
    monitor = SlotMonitor(steps_per_epoch=3)
    assert monitor.compute() == {}
    for slots in ([0, 1], [1], [2]):
        monitor.update([positions(*slots)])
    assert monitor.compute()["slots/largest"].item() == 0.5
    monitor.update([positions(3), positions(3, 2, 2, 2, 2, 2)])  # two batches of one step
    metrics = monitor.compute()
    assert metrics["slots/prototypes_used"].item() == pytest.approx(0.3)  # 1, 2 and 3
    assert metrics["slots/largest"].item() == pytest.approx(5 / 7)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"largest": 0.97}, "one slot has 97 % of all positions"),
        ({"assignment_entropy": 0.999}, "lower --teacher-temp"),
        ({"prototypes_used": 0.05}, "of 10 prototypes were used in the last epoch"),
        ({"positives": 0.0}, "no slot occurs in both views"),
    ],
)
def test_each_problem_is_reported_once_an_epoch_with_advice(metrics: dict[str, float], message: str) -> None:
    monitor = SlotMonitor(steps_per_epoch=2)
    healthy, unhealthy = ({f"slots/{name}": x for name, x in m.items()} for m in (HEALTHY, HEALTHY | metrics))
    monitor.update([positions(0, 1)])
    assert monitor.warnings(unhealthy) == [], "the first epoch is not over"
    warnings = []
    for _ in range(4):
        monitor.update([positions(0, 1)])
        assert monitor.warnings(healthy) == []
        warnings += monitor.warnings(unhealthy)
    assert len(warnings) == 2
    assert all(message in warning for warning in warnings)


def test_collapsed_run_is_reported_within_one_epoch(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """All positions have the same features, to which all prototypes but the first are opposite."""
    flags = ["--init", str(tmp_path / "init.pth"), "--base-lr", "1e-6", "--epochs", "1", "--warmup-epoch", "0"]
    args = main_pretrain.parse_args(tiny(*flags))
    state = build_method(args).state_dict()
    direction = torch.nn.functional.normalize(torch.ones(args.dim_out), dim=0)
    for suffix in "qk":
        state[f"projector_{suffix}.mlp.6.bias"] = 100 * direction
        state[f"grouping_{suffix}.slot_embed.weight"] = torch.stack([direction] + [-direction] * 7)
    torch.save({"model": state}, tmp_path / "init.pth")
    main_pretrain.main(tiny(*flags))
    assert "collapse: one slot has 100 %" in (tmp_path / "run/log.txt").read_text()
