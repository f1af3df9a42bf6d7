"""The slots' health in training: right measures, and a collapse is named within an epoch, with what to do."""

import argparse
import json
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
from models.slot_health import slot_health
from tests.reference import health as reference
from models.slot_health import SlotHealth

Tiny = Callable[..., list[str]]
HEALTHY = {"assignment_entropy": 0.5, "largest_slot": 0.3, "prototypes_used": 1.0, "positives": 20.0}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(2, 9), sharp=st.sampled_from([0.02, 0.07, 1.0]))
def test_the_measures_are_those_of_the_reference(seed: int, count: int, sharp: float) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = ([rng.uniform(-1, 1, (3, count, 2, 3)) for _ in range(2)] for _ in range(2))
    prototypes, center = rng.normal(size=(count, 5)), rng.normal(0, 0.1, count)
    expected = reference.health(student, teacher, prototypes, center, sharp)
    tensors = ([torch.from_numpy(view).float() for view in views] for views in (student, teacher))
    found = slot_health(*tensors, torch.from_numpy(prototypes).float(), torch.from_numpy(center).float()[None], sharp)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=2e-5, atol=2e-6, err_msg=name)


def use(*slots: int, count: int = 10) -> Tensor:
    """A step whose positions are shared by these prototypes."""
    return torch.bincount(torch.tensor(slots), minlength=count).float()


def test_prototypes_in_use_are_those_of_the_last_epoch_whatever_the_reports() -> None:
    watch = SlotHealth(steps_per_epoch=3)
    for slots in ([0, 1], [1], [2], [3]):
        watch.add(use(*slots))
        watch.read()
    assert watch.read()[0] == pytest.approx(0.3)  # 1, 2 and 3


def test_the_largest_slot_is_that_of_the_steps_since_the_last_report() -> None:
    watch = SlotHealth(steps_per_epoch=3)
    watch.add(use(0, 0, 0, 1))
    assert watch.read()[1] == 0.75
    watch.add(use(1, 2))
    assert watch.read()[1] == 0.5


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"largest_slot": 0.97}, "one slot has 97 % of all positions"),
        ({"assignment_entropy": 0.999}, "--teacher-temp sharpens"),
        ({"prototypes_used": 0.05}, "of 10 prototypes were used in the last epoch"),
        ({"positives": 0.0}, "no slot is found in both views"),
    ],
)
def test_what_is_wrong_is_said_once_an_epoch_with_a_cure(wrong: dict[str, float], named: str) -> None:
    watch = SlotHealth(steps_per_epoch=2)
    watch.add(use(0, 1))
    assert watch.warnings(HEALTHY | wrong) == [], "an epoch has not gone by yet"
    said = []
    for _ in range(4):
        watch.add(use(0, 1))
        assert watch.warnings(HEALTHY) == []
        said += watch.warnings(HEALTHY | wrong)
    assert len(said) == 2
    assert all(named in line for line in said)


def collapsed(args: argparse.Namespace, path: Path, one_slot: bool) -> None:
    """Weights with which all positions look alike, and are in the first slot, or in all alike."""
    state = build_method(args).state_dict()
    direction = torch.nn.functional.normalize(torch.randn(args.dim_out), dim=0)
    for half in "qk":
        state[f"projector_{half}.mlp.6.bias"] = 100 * direction
        signs = torch.tensor([1.0] + [-1.0 if one_slot else 1.0] * (args.num_prototypes - 1))
        state[f"grouping_{half}.slot_embed.weight"] = signs[:, None] * direction
    torch.save({"model": state}, path)


@pytest.mark.parametrize("method", ["slotcon", "slotfa"])
@pytest.mark.parametrize(
    ("one_slot", "named"), [(True, "collapse: one slot has 100 %"), (False, "collapse: the teacher")]
)
def test_a_collapse_is_named_within_one_epoch(
    method: str, one_slot: bool, named: str, tiny: Tiny, tmp_path: Path
) -> None:
    flags = ["--method", method, "--init", str(tmp_path / "init.pth"), "--base-lr", "1e-6", "--epochs", "1"]
    argv = tiny(*flags, "--warmup-epoch", "0")
    collapsed(main_pretrain.parse_args(argv), tmp_path / "init.pth", one_slot)
    main_pretrain.main(argv)
    assert named in (tmp_path / "run/log.txt").read_text()


def test_a_healthy_run_is_not_warned_of_and_logs_all_measures(tiny: Tiny, tmp_path: Path) -> None:
    main_pretrain.main(tiny("--print-freq", "1"))
    assert "collapse" not in (tmp_path / "run/log.txt").read_text()
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    names = {"prototypes_used", "slots_per_image", "positives", "assignment_entropy", "prototype_norm"}
    assert names | {"prototype_spread", "largest_slot"} <= last.keys()
    assert "slot_positions" not in last
