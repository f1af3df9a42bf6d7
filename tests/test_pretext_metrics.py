"""Losses and metrics of pre-training on held-out images."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main_pretrain
from data.loader import build_dataset, collate, prefetch
from models import METHODS, build_method
from tests.helpers import METHOD_FLAGS, run_expecting_usage_error, tiny_flags
from transfer.probe import pretext_metrics
from utils.errors import UsageError

pytestmark = pytest.mark.usefixtures("small_encoder")


@pytest.fixture(params=["gtsa", "slotcon"])
def trained(request: pytest.FixtureRequest, images: Path, tmp_path: Path) -> Path:
    """The checkpoint of a run of two epochs."""
    paths = ["--dataset", "folder", "--data-dir", str(images), "--output-dir", str(tmp_path / "run")]
    main_pretrain.main([*paths, *tiny_flags(*METHOD_FLAGS[request.param])])
    return tmp_path / "run/current.pth"


def test_metrics_are_means_over_the_images(trained: Path, images: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", str(images), "--num-workers", "0", "--device", "cpu", "--seed", "5"]
    pretext_metrics.main(
        [str(trained), *flags, "--batch-size", "3", "--max-images", "8", "--out", f"{tmp_path}/m.json"]
    )
    result = json.loads((tmp_path / "m.json").read_text())
    state = torch.load(trained, weights_only=True)
    args = argparse.Namespace(**{**state["args"], "seed": 5})
    method = build_method(args)
    method.load_state_dict(state["model"])
    dataset = build_dataset(args, METHODS[args.method].view_recipes(args))
    sums: dict[str, float] = {}
    for numbers in ((0, 2, 4), (6, 8, 10), (12, 14)):
        batch = next(prefetch([collate([dataset[number] for number in numbers])], torch.device("cpu")))
        batch.epoch = 2.0
        with torch.no_grad():
            outputs = method.eval()(batch)
        sums = {name: sums.get(name, 0) + float(outputs[name]) * len(numbers) for name in result["metrics"]}
    assert result["metrics"] == pytest.approx({name: total / 8 for name, total in sums.items()}, rel=1e-5)
    assert result["images"] == 8
    assert ("loss/correspondence" in result["metrics"]) == ("rotation/accuracy" in result["metrics"])


def test_checkpoints_without_the_arguments_of_later_versions_are_read(trained: Path) -> None:
    state = torch.load(trained, weights_only=True)
    for name in ("patch_size", "drop_path"):
        del state["args"][name]
    torch.save(state, trained)
    method, _, epoch = pretext_metrics.load_method(trained)
    torch.testing.assert_close(method.state_dict(), state["model"], rtol=0, atol=0)
    assert epoch == 2
    del state["args"]["dim_out"]
    torch.save(state, trained)
    with pytest.raises(UsageError, match="its run has no argument dim_out"):
        pretext_metrics.load_method(trained)


def test_files_without_the_heads_of_a_run_are_refused(
    tmp_path: Path, images: Path, tiny: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = build_method(main_pretrain.parse_args(tiny())).encoder_q.state_dict()
    torch.save({"state_dict": encoder}, tmp_path / "encoder.pth")
    argv = [str(tmp_path / "encoder.pth"), "--data-dir", str(images)]
    assert "not of a run of main_pretrain.py" in run_expecting_usage_error(pretext_metrics.main, argv, capsys)
