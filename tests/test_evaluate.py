"""`scripts/evaluate.sh`: from a checkpoint to one table, going on where it stopped."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import models as torchvision_models

from tests.segmentation_data import FOLDER, make_data, small
from transfer import evaluate

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.sh"
CONFIG = FOLDER / "configs/voc12aug/fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py"


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The script in `folder`, whose segmentation data is `folder/data`, with one row of it and no detection data."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    more = {"SEGMENTATION_DATA": str(folder / "data"), "DETECTRON2_DATASETS": str(folder / "none"), "PATH": path}
    options = " ".join(small(CONFIG, 2)[1:])
    words = ("bash", str(SCRIPT), "checkpoint.pth", "--gpus", "0", "--segmentation-options", options, *words)
    return subprocess.run(words, cwd=folder, env=os.environ | more, capture_output=True, text=True, check=False)


def test_what_has_data_is_fine_tuned_and_the_rest_is_named_and_a_second_call_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    torch.save(torchvision_models.resnet50().state_dict(), tmp_path / "checkpoint.pth")
    make_data(tmp_path / "data")
    tasks = ["--only", "voc12aug", "coco", "--out", "out"]
    done = command(tmp_path, *tasks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mmseg.pth: features differ by 0" in done.stdout
    first = tmp_path / "out/voc12aug/seed_0/done.json"
    value = json.loads(first.read_text())["results"]["metrics"]["mIoU"]
    written = first.stat().st_mtime_ns

    done = command(tmp_path, *tasks, "--seeds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert first.stat().st_mtime_ns == written
    assert done.stdout.count("log.txt") == 1
    table = (tmp_path / "out/results.md").read_text()
    assert table in done.stdout
    voc, box, mask = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert voc["values"][0] == value
    assert voc["mean"] == pytest.approx(statistics.fmean(voc["values"]))
    assert f"{voc['mean']:.2f} ± {voc['deviation']:.2f} | 2 |" in table
    assert (box["values"], box["published"], mask["published"]) == ([], 41.0, 37.0)
    assert "Not the published recipe: `train_dataloader" in table
    assert "not installed" in box["note"] or "is not there" in box["note"]

    torch.save(torchvision_models.resnet50().state_dict(), tmp_path / "checkpoint.pth")
    done = command(tmp_path, *tasks)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "of another checkpoint" in done.stderr


def test_a_fine_tuning_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    torch.save(torchvision_models.resnet50().state_dict(), tmp_path / "checkpoint.pth")
    make_data(tmp_path / "data")
    (tmp_path / "data/VOCdevkit/VOC2012/ImageSets/Segmentation/aug.txt").unlink()
    done = command(tmp_path, "--only", "voc12aug", "--out", "out")
    assert done.returncode == 1
    assert "aug.txt: not there" in done.stdout
    assert "| failed, see out/voc12aug/seed_0/log.txt |" in done.stdout


def test_an_encoder_of_another_architecture_runs_nothing_and_says_so(tmp_path: Path) -> None:
    torch.save(torchvision_models.resnet18().state_dict(), tmp_path / "checkpoint.pth")
    done = command(tmp_path, "--out", "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the encoder is a resnet18" in done.stderr
    assert not (tmp_path / "out").exists()


def test_mean_and_deviation_are_over_the_seeds_that_ran(tmp_path: Path) -> None:
    rows = [{"title": "A", "metric": "mIoU", "values": [1.0, 2.0, 4.5], "mean": 2.5, "deviation": 1.803}]
    rows[0] |= {"runs": 3, "published": None, "note": ""}
    assert "| A | mIoU | 2.50 ± 1.80 | 3 |  |  |" in evaluate.markdown(rows)


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--seeds", "0"], "--seeds 0"), (["--only", "voc"], "--only"), ([], "nothing can run here")],
)
def test_mistakes_are_one_line_and_write_nothing(words: list[str], named: str, tmp_path: Path) -> None:
    torch.save(torchvision_models.resnet18().state_dict(), tmp_path / "checkpoint.pth")
    done = command(tmp_path, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert named in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
