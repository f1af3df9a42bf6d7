"""`scripts/evaluate.sh`: fine-tunings, the table of their metrics, and resuming."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18, resnet50

from tests.helpers import run_expecting_usage_error
from tests.segmentation_data import VOC_CONFIG, make_data, small_run
from transfer import evaluate
from transfer.encoders import EncoderWeights
from transfer.verify import verify

SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.sh"
CAPSYS = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    torch.save(resnet50().state_dict(), path)
    return path


def test_checkpoint_becomes_a_table(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    environment = os.environ | {
        "SEGMENTATION_DATA": str(make_data(tmp_path / "data")),
        "DETECTRON2_DATASETS": str(tmp_path / "missing"),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    overrides = ["model.decode_head.channels=16", "default_hooks.checkpoint.interval=2"]
    overrides += ["default_hooks.checkpoint.save_last=False"]  # saving takes seconds
    options = " ".join([*small_run(VOC_CONFIG, 1)[1:], *overrides])
    argv = ["bash", str(SCRIPT), str(checkpoint), "--gpus", "0", "--only", "voc12aug", "coco", "--out", "out"]
    argv += ["--segmentation-options", options]
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mmseg.pth: features differ by 0" in result.stdout

    miou = json.loads((tmp_path / "out/voc12aug/seed_0/done.json").read_text())["results"]["metrics"]["mIoU"]
    voc, box, mask = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert (voc["values"], voc["mean"], voc["std"], voc["runs"]) == ([miou], miou, None, 1)
    assert (box["values"], box["published"], mask["published"]) == ([], 41.0, 37.0)
    assert "is not installed" in box["note"] or "does not exist" in box["note"]
    table = (tmp_path / "out/results.md").read_text()
    assert table in result.stdout
    assert "Not the published recipe: `train_dataloader" in table


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command in-process for the two fine-tunings on VOC, with a program in place of each; return the status.

    The program of `voc12aug` fails while the file `fail` exists.
    """
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / "data/VOCdevkit/VOC2012" / folder).mkdir(parents=True)
    monkeypatch.setenv("SEGMENTATION_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("transfer.finetuning.find_spec", lambda _: True)
    monkeypatch.setattr(evaluate, "verify", lambda *_: "verified")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mmseg.pth").touch()  # an existing conversion is not repeated

    def build_command(args: object, name: str, seed: int, encoder: EncoderWeights) -> list[str]:
        folder = tmp_path / f"out/{name}/seed_{seed}/run"
        script = f"""import pathlib, sys
if {name == "voc12aug"} and pathlib.Path({str(tmp_path / "fail")!r}).exists():
    sys.exit("train.py: out of order")
folder = pathlib.Path({str(folder)!r})
folder.mkdir()
(folder / "results.json").write_text('{{"metrics": {{"mIoU": {40 + seed}}}}}')"""
        return [sys.executable, "-c", script]

    monkeypatch.setattr(evaluate, "build_command", build_command)

    def main(*flags: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(
                [str(checkpoint), "--out", str(tmp_path / "out"), "--only", "voc12aug", "voc12aug_d8", *flags]
            )
        return int(stopped.value.code or 0)

    return main


def test_failed_fine_tuning_is_reported_and_repeated_by_the_next_call(
    run: Callable[..., int], tmp_path: Path, capsys: CAPSYS
) -> None:
    (tmp_path / "fail").touch()
    assert run() == 1
    output = capsys.readouterr().out
    assert "failed with exit status 1: train.py: out of order" in output
    assert f"failed, see {tmp_path}/out/voc12aug/seed_0/log.txt" in output
    assert "| 40.00        |" in output
    (tmp_path / "fail").unlink()
    assert run() == 0
    output = capsys.readouterr().out
    assert "voc12aug/seed_0/log.txt" in output
    assert "voc12aug_d8/seed_0/log.txt" not in output


def test_existing_conversion_is_verified_before_it_is_used(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPSYS
) -> None:
    monkeypatch.setattr(evaluate, "verify", verify)
    assert run() == 2
    assert f"{tmp_path}/out/mmseg.pth" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("log.txt"))


def test_metric_that_a_run_does_not_have_is_empty() -> None:
    assert evaluate._look_up({"bbox": {"AP": 3.0}}, "bbox.AP") == 3
    assert [evaluate._look_up(results, "segm.AP") for results in ({"bbox": {"AP": 3.0}}, {"segm": {}}, None)] == [
        None
    ] * 3


def test_several_seeds_give_mean_and_sample_standard_deviation(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--seeds", "3") == 0
    row = json.loads((tmp_path / "out/results.json").read_text())["results"][0]
    assert (row["values"], row["mean"], row["std"], row["runs"]) == ([40, 41, 42], 41, 1, 3)
    assert "41.00 ± 1.00" in (tmp_path / "out/results.md").read_text()


def test_folder_of_another_evaluation_is_refused(
    run: Callable[..., int], checkpoint: Path, tmp_path: Path, capsys: CAPSYS
) -> None:
    assert run() == 0
    argv = [str(checkpoint), "--out", str(tmp_path / "out"), "--only", "voc12aug"]
    options = [*argv, "--segmentation-options", "train_cfg.max_iters=9"]
    error = run_expecting_usage_error(evaluate.main, options, capsys)
    assert "contains the evaluation of --segmentation-options ''" in error
    torch.save(resnet50().state_dict(), tmp_path / "other.pth")
    error = run_expecting_usage_error(evaluate.main, [str(tmp_path / "other.pth"), *argv[1:]], capsys)
    assert "contains the evaluation of another checkpoint" in error


def test_commands_are_the_published_ones(tmp_path: Path) -> None:
    args = evaluate._parse_args(
        ["ckpt.pth", "--out", str(tmp_path), "--gpus", "8", "--detection-options=--auto-scale SOLVER.MAX_ITER 9"]
    )
    encoder = EncoderWeights({}, "resnet50", {"method": "slotfa"})
    command = " ".join(evaluate.build_command(args, "coco", 1, encoder))
    assert "train_net.py --config-file" in command
    assert "COCO_R_50_FPN_1x_SlotFA.yaml --num-gpus 8 --auto-scale MODEL.WEIGHTS" in command
    assert command.endswith(f"OUTPUT_DIR {tmp_path}/coco/seed_1/run SEED 1 SOLVER.MAX_ITER 9")
    run = tmp_path / "voc12aug/seed_0/run"
    run.mkdir(parents=True)
    (run / "last_checkpoint").touch()
    command = " ".join(evaluate.build_command(args, "voc12aug", 0, encoder))
    assert command.endswith(f"{VOC_CONFIG} {tmp_path}/mmseg.pth 8 --work-dir {run} --seed 0 --resume")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--detection-options=--resume"], "--resume is not supported; only --auto-scale"),
        (["--only", "voc"], "--only"),
        ([], "the encoder is resnet18"),
    ],
)
def test_usage_error_is_one_line_and_writes_nothing(
    flags: list[str], message: str, tmp_path: Path, capsys: CAPSYS
) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "checkpoint.pth")
    argv = [str(tmp_path / "checkpoint.pth"), "--out", str(tmp_path / "out"), *flags]
    assert message in run_expecting_usage_error(evaluate.main, argv, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
