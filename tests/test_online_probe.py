"""The linear probe during pre-training: it reports when asked to, and does not change what is learned."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main_pretrain
from tests.helpers import run_expecting_usage_error
from tests.probe_data import make_folder, make_method, make_vit_method
from transfer.probe import online_probe
from transfer.probe.labeled_features import LAYOUTS
from transfer.probe.online_probe import OnlineProbe
from utils.config import PROBE_DATASETS


@pytest.fixture
def labeled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Labeled images, for a small probe."""
    monkeypatch.setattr(online_probe, "_STEPS", 20)
    monkeypatch.setattr(online_probe, "_SIZE", 64)
    return make_folder(tmp_path / "labeled")


def probe_args(labeled: Path, arch: str = "resnet18") -> argparse.Namespace:
    return argparse.Namespace(probe_dir=str(labeled), probe_dataset="folder", arch=arch, output_stride=32)


def test_pretraining_reports_the_probe_every_few_epochs_and_at_the_end(
    labeled: Path, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    main_pretrain.main(tiny("--epochs", "3", "--probe-freq", "2", "--probe-dir", str(labeled)))
    reports = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    probed = [report for report in reports if "probe/miou" in report]
    assert [report["epoch"] for report in probed] == [2, 3]
    assert all(0 < report["probe/miou"] <= 100 and 0 < report["probe/accuracy"] <= 100 for report in probed)


def test_probe_changes_neither_the_encoder_nor_the_random_state(labeled: Path) -> None:
    encoder = make_method().encoder_k.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    OnlineProbe(probe_args(labeled)).measure(encoder, torch.device("cpu"))
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_features_beyond_float16_are_clamped(labeled: Path) -> None:
    scores = OnlineProbe(probe_args(labeled)).measure(HugeFeatures(), torch.device("cpu"))
    assert all(0 < score <= 100 for score in scores.values())


class HugeFeatures(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 1e6 * F.avg_pool2d(images, 16)


def test_encoder_of_gtsa_is_measured(labeled: Path) -> None:
    args = probe_args(labeled, "vit_tiny_patch16_224")
    scores = OnlineProbe(args).measure(make_vit_method("gtsa").encoder_k, torch.device("cpu"))
    assert all(0 < score <= 100 for score in scores.values())


_PATCHES_OF_12 = ["--arch", "vit_tiny_patch16_224", "--patch-size", "12", "--image-size", "60", "--probe-dir", "folder"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--probe-freq: needs --probe-dir"),
        (["--probe-dir", "nowhere"], "--probe-dir nowhere: no such folder"),
        (_PATCHES_OF_12, "--probe-freq: the probe's images of 224 px are no multiple of the patch size 12"),
    ],
)
def test_probe_that_cannot_run_is_a_usage_error(
    flags: list[str], message: str, tiny: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run_expecting_usage_error(main_pretrain.main, tiny("--probe-freq", "1", *flags), capsys)
    assert not (tmp_path / "run").exists()


def test_probe_dataset_choices_are_the_layouts() -> None:
    assert tuple(PROBE_DATASETS) == tuple(LAYOUTS)
