"""The linear probe during pre-training: reported when asked for, and without a trace in what is learned."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from data.demo import render_scene

Tiny = Callable[..., list[str]]


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    """Six scenes to train on and four to measure on, with their masks."""
    for split, count in (("train", 6), ("val", 4)):
        for number in range(count):
            for kind, pixels in zip(("images", "masks"), render_scene(0, split, number, 96, 72)):
                folder = tmp_path / "labeled" / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "labeled"


def test_it_reports_every_so_many_epochs_and_changes_nothing(labeled: Path, tiny: Tiny, tmp_path: Path) -> None:
    main_pretrain.main(tiny("--epochs", "3"))
    (tmp_path / "run").rename(tmp_path / "plain")
    main_pretrain.main(tiny("--epochs", "3", "--probe-freq", "2", "--probe-dir", str(labeled)))
    reports = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [report["epoch"] for report in reports if "probe_miou" in report] == [2, 3]
    assert all(0 < report["probe_miou"] <= 100 for report in reports if "probe_miou" in report)
    board = EventAccumulator(str(tmp_path / "run"))
    board.Reload()
    assert {"probe/probe_miou", "probe/probe_accuracy"} <= set(board.Tags()["scalars"])
    runs = [torch.load(tmp_path / name / "current.pth", weights_only=True)["model"] for name in ("plain", "run")]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize(
    ("flags", "named"), [([], "needs --probe-dir"), (["--probe-dir", "nowhere"], "no pairs of image and mask")]
)
def test_without_labeled_images_one_line_says_so(
    flags: list[str], named: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.main(tiny("--probe-freq", "1", *flags))
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert named in line
    assert not (tmp_path / "run").exists()
