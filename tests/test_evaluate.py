"""`scripts/evaluate.sh`: fine-tunings, the table of their metrics, estimates of their time, and resuming."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18, resnet50

from tests.helpers import run_expecting_usage_error
from tests.probe_data import make_inat19
from tests.segmentation_data import VOC_CONFIG, make_data, small_run
from transfer import evaluate
from transfer.classification import finetune
from transfer.encoders import EncoderWeights, untrained_encoder
from transfer.evaluation.fine_tunings import DEFAULT_NAMES, FINE_TUNINGS
from transfer.evaluation.recipe_options import add_max_val_images, change_length, parse_options
from transfer.evaluation.recipe_records import compute_config_checksum
from transfer.evaluation.runs import FineTuningRun, build_command
from transfer.evaluation.training_time import (
    ImageFlops,
    RunLength,
    count_encoder_flops,
    estimate_seconds,
    format_duration,
)
from transfer.verify import verify

ROOT = Path(__file__).parents[1]
CAPSYS = pytest.CaptureFixture[str]
NAMES = ("voc12aug", "coco", "voc12aug_imagenet_norm")
SUCCESS = """
import pathlib, sys
folder, value = pathlib.Path(sys.argv[1]), 40 + int(sys.argv[2])
folder.mkdir(exist_ok=True)
(folder / "results.json").write_text(
    '{"metrics": {"mIoU": %d}, "bbox": {"AP": %d}, "segm": {"AP": null}, "top1": %d}' % (value, value, value)
)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pth"
    torch.save(resnet50().state_dict(), path)
    return path


def run_script(script: Path, arguments: list[str], folder: Path) -> list[str]:
    """Run a copy of a script of the project, and return the arguments that it passes to Python."""
    copy = folder / script.relative_to(ROOT)
    python = folder / ".venv/bin/python"
    for path in (copy, python):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(script, copy)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    command = ["bash", str(copy), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_script_passes_its_arguments(tmp_path: Path) -> None:
    arguments = ["a checkpoint.pth", "--detection-options", "SOLVER.MAX_ITER 9"]
    assert run_script(ROOT / "scripts/evaluate.sh", arguments, tmp_path) == [
        f"{tmp_path}/transfer/evaluate.py",
        *arguments,
    ]


@pytest.fixture
def sigterm_handler() -> Iterator[None]:
    """Restore the signal handler that the command replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("sigterm_handler")
def test_checkpoint_becomes_a_table(
    checkpoint: Path, tmp_path: Path, capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fine-tuning is that of the published command, but in this process, which has imported mmsegmentation."""
    pytest.importorskip("mmseg")
    from mmengine.config import Config

    from transfer.segmentation import train

    def run_command(command: list[str], _: object) -> int:
        train.main(run_script(Path(command[1]), command[2:], tmp_path)[1:])
        return 0

    monkeypatch.setenv("SEGMENTATION_DATA", str(make_data(tmp_path / "data")))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "missing"))
    monkeypatch.setattr("transfer.evaluation.runs.run_command", run_command)
    monkeypatch.setattr("transfer.evaluation.plan.measure_throughput", lambda: 100.0)
    monkeypatch.setattr(Config, "pretty_text", "")  # of the log; formatting it takes seconds
    overrides = ["model.decode_head.channels=16", "default_hooks.checkpoint.interval=2"]
    overrides += ["default_hooks.checkpoint.save_last=False"]  # saving takes seconds
    options = " ".join([*small_run(VOC_CONFIG, 1)[1:], *overrides])
    argv = [str(checkpoint), "--device", "cpu", "--only", "voc12aug", "coco", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*argv, "--max-val-images", "1", "--segmentation-options", options])
    output = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "mmseg.pth: features differ by 0" in output
    plan = next(line for line in output.splitlines() if line.startswith("voc12aug"))
    assert plan.split()[:8] == ["voc12aug", "1", "1", "x", "2", "1", "x", "1"]

    miou = json.loads((tmp_path / "out/voc12aug/seed_0/done.json").read_text())["results"]["metrics"]["mIoU"]
    voc, box, mask = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert (voc["values"], voc["mean"], voc["std"], voc["runs"]) == ([miou], miou, None, 1)
    assert voc["recipe"].startswith("changed: --max-val-images=1 train_dataloader")
    assert (box["values"], box["published"], mask["published"]) == ([], None, None)
    assert box["note"].startswith("skipped: ")
    assert (tmp_path / "out/results.md").read_text() in output


@dataclass
class Command:
    """The command in this process, with a small program in place of each fine-tuning, on a machine with 8 GPUs."""

    folder: Path
    arch: str = "resnet50"
    programs: dict[str, str] = field(default_factory=dict)
    """Name of a fine-tuning -> Python code to run instead of `SUCCESS`."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def argv(self, *flags: str) -> list[str]:
        only = [] if "--only" in flags else ["--only", *NAMES]
        return [str(self.folder / "checkpoint.pth"), "--out", str(self.out), *only, *flags]

    def run(self, *flags: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(self.argv(*flags))
        return int(stopped.value.code or 0)

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        rows = json.loads((self.out / "results.json").read_text())["results"]
        return {(row["name"], row["metric"]): row for row in rows}

    def read_encoder(self, path: Path, which: str | None) -> EncoderWeights:
        return EncoderWeights({}, self.arch, {"source_sha256": path.name, "encoder": which or "teacher"})

    def build_command(self, _: object, run: FineTuningRun, encoder: EncoderWeights) -> list[str]:
        code = self.programs.get(run.name, SUCCESS)
        return [sys.executable, "-I", "-S", "-c", code, str(run.folder / "run"), str(run.seed)]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sigterm_handler: None) -> Command:
    """The command, with the data of all fine-tunings linked and an encoder that is named after its file."""
    result = Command(tmp_path)
    for name, fine_tuning in FINE_TUNINGS.items():
        make_required(tmp_path / fine_tuning.task, name)
    monkeypatch.setenv("SEGMENTATION_DATA", str(tmp_path / "segmentation"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "detection"))
    monkeypatch.setenv("CLASSIFICATION_DATA", str(tmp_path / "classification"))
    monkeypatch.setattr("transfer.frameworks.find_spec", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(evaluate, "read_encoder", result.read_encoder)
    monkeypatch.setattr(evaluate, "write_converted", lambda path, *_: path.touch())
    monkeypatch.setattr(evaluate, "verify", lambda *_: "verified")
    monkeypatch.setattr("transfer.evaluation.runs.build_command", result.build_command)
    return result


def make_required(root: Path, name: str) -> list[Path]:
    """Make the files and folders that a fine-tuning requires, and return their paths."""
    paths = [root / path.replace("*", "x") for path in FINE_TUNINGS[name].dataset.required]
    for path in paths:
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    return paths


def test_later_call_keeps_the_rows_of_earlier_ones(command: Command) -> None:
    command.programs["coco"] = "raise SystemExit('train_net.py: out of order')"
    assert command.run("--only", "coco", "voc12aug", "--seeds", "2") == 1
    before = command.rows()
    assert command.run("--only", "voc12aug_imagenet_norm") == 0
    after = command.rows()
    assert set(after) == {*before, ("voc12aug_imagenet_norm", "mIoU")}
    assert {key: after[key] for key in before} == before
    assert before["voc12aug", "mIoU"]["values"] == [40, 41]
    assert "out of order" in before["coco", "box AP"]["note"]


def test_table_shows_more_runs_than_the_call_asked_for(command: Command) -> None:
    assert command.run("--only", "voc12aug", "--seeds", "3") == 0
    assert command.run("--only", "voc12aug") == 0
    row = command.rows()["voc12aug", "mIoU"]
    assert (row["values"], row["mean"], row["std"], row["runs"], row["note"]) == ([40, 41, 42], 41, 1, 3, "")
    assert "41.00 ± 1.00" in (command.out / "results.md").read_text()


def test_failed_fine_tuning_is_reported_and_repeated_by_the_next_call(command: Command, capsys: CAPSYS) -> None:
    command.programs["voc12aug"] = "raise SystemExit('train.py: out of order')"
    assert command.run("--only", "voc12aug", "voc12aug_d8") == 1
    log = command.out / "voc12aug/seed_0/log.txt"
    note = f"failed: train.py: out of order, see {log}"
    assert command.rows()["voc12aug", "mIoU"]["note"] == note
    output = capsys.readouterr().out
    assert f"[1/2] PASCAL VOC, FCN d6 stride 16, 30k, seed 0: {log}" in output
    assert "failed with exit status 1: train.py: out of order" in output
    assert f"| {note}" in output
    del command.programs["voc12aug"]
    assert command.run("--only", "voc12aug", "voc12aug_d8") == 0
    assert command.rows()["voc12aug", "mIoU"]["note"] == ""
    assert not list(command.out.rglob("failed.json"))
    assert "[1/1] PASCAL VOC, FCN d6 stride 16, 30k, seed 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('train.py: no such file'); raise SystemExit('later')", "train.py: no such file"),
        ("print('first', flush=True); raise SystemExit('the last\\n=====')", "the last"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (
            "raise SystemExit('[rank1]: RuntimeError: a|b\\nelastic.ChildFailedError:\\n===')",
            "[rank1]: RuntimeError: a|b",
        ),
        ("raise SystemExit('x' * 999 + 'y')", "x" * 59 + "…" + "x" * 58 + "y"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("", "no results.json was written"),
        ("raise SystemExit(1)", "no output"),
    ],
)
def test_reason_of_a_failure_is_one_short_line(code: str, reason: str, command: Command) -> None:
    command.programs["voc12aug"] = "raise SystemExit('train.py: the failure of an earlier call')"
    command.run("--only", "voc12aug")
    command.programs["voc12aug"] = code
    assert command.run("--only", "voc12aug") == 1
    note = command.rows()["voc12aug", "mIoU"]["note"]
    assert note == f"failed: {reason}, see {command.out}/voc12aug/seed_0/log.txt"
    table = (command.out / "results.md").read_text()
    assert note.replace("|", r"\|") in table


def test_interrupted_call_resumes(command: Command, capsys: CAPSYS) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    command.programs["coco"] = f"import os, time; os.kill({os.getpid()}, {signal.SIGTERM}); time.sleep(60)"
    assert command.run("--only", "coco", "voc12aug") == 130
    assert "interrupted; run the same command again to resume" in capsys.readouterr().err
    assert [row["note"] for row in command.rows().values()] == ["not finished"] * 3
    del command.programs["coco"]
    assert command.run("--only", "voc12aug", "coco") == 0
    assert command.rows()["coco", "box AP"]["values"] == [40]
    assert signal.getsignal(signal.SIGTERM) is handler  # otherwise it would be inherited by processes of later tests


def test_signal_at_the_start_of_a_run_ends_its_process(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(popen(*args, **options))
        signal.raise_signal(signal.SIGTERM)
        return processes[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    command.programs["coco"] = "import time; time.sleep(60)"
    assert command.run("--only", "coco") == 130
    status = processes[0].poll()
    processes[0].kill()
    assert status == -signal.SIGTERM


def test_name_that_is_given_twice_runs_once(command: Command, capsys: CAPSYS) -> None:
    assert command.run("--only", "voc12aug", "voc12aug") == 0
    assert "[1/1] PASCAL VOC" in capsys.readouterr().out


def test_metric_that_a_run_does_not_have_is_empty(command: Command) -> None:
    assert command.run("--only", "coco") == 0
    row = command.rows()["coco", "mask AP"]
    assert (row["values"], row["mean"]) == ([], None)
    assert row["note"] == "the run has no such metric"


@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_each_missing_path_is_named(name: str, command: Command) -> None:
    fine_tuning = FINE_TUNINGS[name]
    root = command.folder / fine_tuning.task
    arch = fine_tuning.arch or "resnet18"
    assert fine_tuning.why_unavailable(arch) == ""
    for path, required in zip(make_required(root, name), fine_tuning.dataset.required):
        path.rename(command.folder / "moved")
        assert fine_tuning.why_unavailable(arch) == f"{root / required} does not exist"
        (command.folder / "moved").rename(path)


def test_partial_data_is_skipped_and_finished_runs_are_kept(command: Command, capsys: CAPSYS) -> None:
    assert command.run("--only", "voc12aug") == 0
    masks = command.folder / "segmentation/VOCdevkit/VOC2012/SegmentationClass"
    masks.rmdir()
    assert command.run("--only", "voc12aug", "voc12aug_d8", "coco") == 0
    assert f"skipped voc12aug_d8: {masks} does not exist" in capsys.readouterr().out
    rows = command.rows()
    assert rows["voc12aug_d8", "mIoU"]["note"] == f"skipped: {masks} does not exist"
    assert (rows["voc12aug", "mIoU"]["values"], rows["voc12aug", "mIoU"]["note"]) == ([40], "")
    assert rows["coco", "box AP"]["values"] == [40]
    assert command.run("--only", "cityscapes") == 0
    (command.folder / "segmentation/cityscapes/gtFine/val").rename(command.folder / "moved")
    assert command.run("--only", "cityscapes_imagenet_norm") == 2
    assert "gtFine/val does not exist" in command.rows()["cityscapes_imagenet_norm", "mIoU"]["note"]
    assert command.run("--only", "voc12aug", "--seeds", "2") == 0
    row = command.rows()["voc12aug", "mIoU"]
    assert (row["values"], row["note"]) == ([40], f"skipped: {masks} does not exist")


def test_nothing_linked_is_said_in_a_short_line(
    command: Command, capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.frameworks.find_spec", lambda name: name != "detectron2" or None)
    monkeypatch.setenv("SEGMENTATION_DATA", "data")
    monkeypatch.setenv("CLASSIFICATION_DATA", "labeled")
    monkeypatch.chdir(command.folder)
    assert command.run("--only", *DEFAULT_NAMES) == 2
    output = capsys.readouterr()
    assert output.err.endswith(
        "no fine-tuning can run: no complete dataset in data; detectron2 is not installed; no complete dataset in "
        "labeled; "
        'see "Install" and "Link the data" in transfer/README.md\n'
    )
    assert "skipped ade20k: data/ade/ADEChallengeData2016/images/training does not exist\n" in output.out
    assert output.out.count("\n") == len(DEFAULT_NAMES)
    assert not command.out.exists()


INAT19_TRAINING_IMAGES = 265_213


@pytest.mark.parametrize("name", FINE_TUNINGS)
def test_required_paths_and_length_are_those_of_the_config(name: str) -> None:
    fine_tuning = FINE_TUNINGS[name]
    if fine_tuning.task == "classification":
        args = finetune.parse_args(["checkpoint.pth", "--data-dir", "data"])
        steps = INAT19_TRAINING_IMAGES // args.batch_size
        assert fine_tuning.length == RunLength(args.epochs * steps, args.batch_size, steps, epochs=args.epochs)
        return
    read_config = {"detection": read_detection_config, "segmentation": read_segmentation_config}[fine_tuning.task]
    paths, length = read_config(str(fine_tuning.config_path()))
    assert fine_tuning.length == length
    assert {path for path in fine_tuning.dataset.required if "*" not in path} == paths


def read_segmentation_config(path: str) -> tuple[set[str], RunLength]:
    pytest.importorskip("mmseg")
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    paths = set()
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for dataset in loader.dataset.get("datasets", [loader.dataset]):
            parts = [*dataset.data_prefix.values(), dataset.get("ann_file", "")]
            paths |= {str(Path(dataset.data_root, part).relative_to("data")) for part in parts if part}
    length = cfg.train_cfg
    return paths, RunLength(length.max_iters, cfg.auto_scale_lr.base_batch_size, length.val_interval)


def read_detection_config(path: str) -> tuple[set[str], RunLength]:
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.data import MetadataCatalog

    from transfer.detection.d2_vit import add_vit_config

    cfg = get_cfg()
    add_vit_config(cfg)
    cfg.merge_from_file(path)
    paths = set()
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        metadata = MetadataCatalog.get(dataset).as_dict()
        keys = ("json_file", "image_root", "image_dir", "gt_dir")
        files = [Path(metadata[key]) for key in keys if metadata.get(key)]
        root = next(parent for parent in files[0].parents if parent.name in ("coco", "cityscapes")).parent
        paths |= {str(file.relative_to(root)) for file in files}
    solver = cfg.SOLVER
    return paths, RunLength(solver.MAX_ITER, solver.IMS_PER_BATCH, cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER)


def test_table_says_which_recipe_a_row_used(command: Command) -> None:
    options = ["--detection-options", "--auto-scale SOLVER.MAX_ITER 900"]
    assert command.run(*options) == 0
    rows = command.rows()
    assert rows["voc12aug", "mIoU"]["recipe"] == "released"
    assert rows["voc12aug_imagenet_norm", "mIoU"]["recipe"] == "ImageNet normalization"
    assert rows["coco", "box AP"]["recipe"] == "changed: --auto-scale SOLVER.MAX_ITER=900"
    assert rows["coco", "box AP"]["published"] is None
    assert "| changed: --auto-scale SOLVER.MAX_ITER=900 |" in (command.out / "results.md").read_text()
    done = json.loads((command.out / "coco/seed_0/done.json").read_text())
    assert done["recipe"] == "changed: --auto-scale SOLVER.MAX_ITER=900"


def test_long_recipe_follows_below_the_table(command: Command) -> None:
    options = "SOLVER.MAX_ITER 900 SOLVER.STEPS (600,) INPUT.MIN_SIZE_TEST 400"
    assert command.run("--only", "coco", "--detection-options", options) == 0
    table, _, footnote = (command.out / "results.md").read_text().partition("\n\n[1] ")
    assert table.count("| changed [1] |") == 2
    assert footnote == "changed: SOLVER.MAX_ITER=900 SOLVER.STEPS=(600,) INPUT.MIN_SIZE_TEST=400\n"


def test_row_keeps_the_recipe_with_which_it_was_run(command: Command) -> None:
    assert command.run("--only", "voc12aug") == 0
    record = command.out / "voc12aug/seed_0/done.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"recipe": "of an earlier version"}))
    assert command.run("--only", "voc12aug") == 0
    assert command.rows()["voc12aug", "mIoU"]["recipe"] == "of an earlier version"
    record.write_text(json.dumps({"results": json.loads(record.read_text())["results"]}))  # as it was before
    assert command.run("--only", "voc12aug") == 0
    assert command.rows()["voc12aug", "mIoU"]["recipe"] == "unknown"


def test_options_follow_the_recipe_that_is_not_the_released_one(command: Command) -> None:
    assert command.run("--only", "voc12aug_imagenet_norm", "--segmentation-options", "train_cfg.max_iters=9") == 0
    recipe = command.rows()["voc12aug_imagenet_norm", "mIoU"]["recipe"]
    assert recipe == "ImageNet normalization, changed: train_cfg.max_iters=9"


def test_recipes_that_are_not_released_run_on_request_only() -> None:
    assert set(FINE_TUNINGS) - set(DEFAULT_NAMES) == {"voc12aug_imagenet_norm", "cityscapes_imagenet_norm"}
    for fine_tuning in FINE_TUNINGS.values():
        assert fine_tuning.task == "classification" or fine_tuning.config_path("SlotFA").is_file()


@pytest.fixture
def without_gpu(command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("transfer.evaluation.plan.measure_throughput", lambda: 100.0)
    lists = command.folder / "segmentation/VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "val.txt").write_text("image\n" * 1449)
    return command


@pytest.mark.parametrize("flags", [(), ("--gpus", "8")])
def test_without_gpu_the_runs_are_listed_with_their_time_and_not_started(
    flags: tuple[str, ...], without_gpu: Command, capsys: CAPSYS
) -> None:
    assert without_gpu.run("--only", "voc12aug", "coco", "--seeds", "2", *flags) == 2
    output = capsys.readouterr()
    plan = " ".join(output.out.split())
    assert "voc12aug 2 30,000 x 16 6 x 1,449 about 27 days" in plan
    assert "coco 2 90,000 x 16 1 x 0 about 532 days" in plan
    assert "In total about 558 days" in plan
    assert output.err.endswith("no GPU found; add --device cpu to start these runs on the CPU\n")
    assert not without_gpu.out.exists()


def test_device_cpu_lists_and_starts_the_runs(without_gpu: Command, capsys: CAPSYS) -> None:
    flags = ("--segmentation-options", "train_cfg.max_iters=3", "--max-val-images", "10")
    assert without_gpu.run("--device", "cpu", *flags) == 0
    assert "voc12aug 1 3 x 16 1 x 10 about 2 minutes" in " ".join(capsys.readouterr().out.split())
    assert without_gpu.rows()["voc12aug", "mIoU"]["values"] == [40]


def test_finished_evaluation_needs_no_gpu(without_gpu: Command, capsys: CAPSYS) -> None:
    assert without_gpu.run("--device", "cpu") == 0
    assert without_gpu.run() == 0
    assert "iterations x images" not in capsys.readouterr().out.split("written to")[1]


def test_device_cpu_is_passed_to_the_commands_also_where_there_are_gpus(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.evaluation.plan.measure_throughput", lambda: 100.0)
    gpus = []

    def fine_tune(args: argparse.Namespace, *_: object) -> bool:
        gpus.append(args.gpus)
        return True

    monkeypatch.setattr(evaluate, "fine_tune", fine_tune)
    for flags in (["--device", "cpu"], [], ["--gpus", "2"]):
        command.run("--only", "voc12aug", *flags)
    assert gpus == [0, 8, 2]


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("detection", "", (90000, 16, 0, 200)),
        ("detection", "SOLVER.MAX_ITER 900 TEST.EVAL_PERIOD 300 TEST.PRECISE_BN.NUM_ITER 7", (900, 16, 300, 7)),
        ("detection", "--auto-scale", (720000, 2, 0, 200)),
        ("detection", "--auto-scale SOLVER.IMS_PER_BATCH 32 SOLVER.MAX_ITER 90", (720, 4, 0, 200)),
        ("segmentation", "model.decode_head.channels=9", (30000, 16, 5000, 0)),
        (
            "segmentation",
            "train_cfg.max_iters=900 train_cfg.val_interval=450 auto_scale_lr.base_batch_size=2",
            (900, 2, 450, 0),
        ),
        ("classification", "--mixup 0", (25800, 1024, 258, 0, 0, 100)),
        ("classification", "--epochs=2 --batch-size 256", (2 * 1032, 256, 1032, 0, 0, 2)),
    ],
)
def test_options_change_the_length(task: str, options: str, expected: tuple[int, ...]) -> None:
    fine_tuning = FINE_TUNINGS[{"detection": "coco", "segmentation": "voc12aug", "classification": "inat19"}[task]]
    assert change_length(fine_tuning, parse_options(task, options), processes=1) == RunLength(*expected)


def test_time_is_that_of_training_batch_norm_statistics_and_evaluations() -> None:
    length = RunLength(iterations=10, batch_size=4, eval_period=4, precise_bn=5)
    # 10 x 4 x 30 for training; 3 evaluations (after 4, 8 and 10 iterations) of 5 x 4 x 30 / 3 + 7 x 8 each
    assert estimate_seconds(length, ImageFlops(30, 8), val_images=7, throughput=2) == (1200 + 3 * (200 + 56)) / 2


COUNTED = {fine_tuning.flops: name for name, fine_tuning in FINE_TUNINGS.items() if fine_tuning.flops}


@pytest.mark.parametrize("name", COUNTED.values())
def test_operations_are_those_of_the_model(name: str) -> None:
    fine_tuning = FINE_TUNINGS[name]
    assert fine_tuning.flops
    count = {"detection": count_detection, "segmentation": count_segmentation}[fine_tuning.task]
    with torch.device("meta"):  # shapes without memory or arithmetic
        training, evaluation = count(str(fine_tuning.config_path()))
    assert training == pytest.approx(fine_tuning.flops.training, rel=0.01)
    assert evaluation == pytest.approx(fine_tuning.flops.evaluation, rel=0.01)


def test_operations_of_an_encoder_are_counted() -> None:
    """The published numbers count a multiplication with addition as one operation."""
    for arch, published in (("resnet18", 1.81), ("vit_tiny_patch16_224", 1.26)):
        flops = count_encoder_flops(arch)
        assert flops.evaluation == pytest.approx(2 * published, rel=0.02)
        assert flops.training == 3 * flops.evaluation


def count_segmentation(config: str) -> tuple[float, float]:
    """Return the GFLOP of training on a crop, and of evaluation on an image of 4:3 or on 8 windows (Cityscapes)."""
    pytest.importorskip("mmseg")
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmseg.registry import MODELS

    from transfer.segmentation.mm_config import import_and_register_mmseg

    import_and_register_mmseg()
    cfg = Config.fromfile(config)
    size = cfg.model.data_preprocessor.size[0]
    windows, width = (8, size) if cfg.model.test_cfg.mode == "slide" else (1, size * 4 // 3)
    divisor = cfg.model.data_preprocessor.get("test_cfg", {}).get("size_divisor", 1)
    width = -(-width // divisor) * divisor
    with torch.device("cpu"):  # the ViT reads its drop path rates from a tensor
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model = model.to("meta")
    heads = [head for head in (model.decode_head, getattr(model, "auxiliary_head", None)) if head]
    with FlopCounterMode(display=False) as training:
        features = model.extract_feat(torch.zeros(2, 3, size, size))
        torch.stack([head(features).sum() for head in heads]).sum().backward()
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        model.decode_head(model.extract_feat(torch.zeros(1, 3, size, width)))
    return training.get_total_flops() / 2e9, windows * evaluation.get_total_flops() / 1e9


def count_detection(config: str) -> tuple[float, float]:
    """Return the GFLOP of training and evaluation with the numbers of proposals and masks of the fine-tunings."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from transfer.detection.d2_vit import add_vit_config

    cfg = get_cfg()
    add_vit_config(cfg)
    cfg.merge_from_file(config)
    cfg.MODEL.DEVICE = "meta"
    model = build_model(cfg).eval()  # SyncBN needs several processes for training
    rpn, heads = model.proposal_generator, model.roi_heads

    def forward(height: int, width: int, proposals: int, masks: int) -> torch.Tensor:
        features = model.backbone(torch.zeros(1, 3, height, width))
        logits, deltas = rpn.rpn_head([features[name] for name in rpn.in_features])
        regions = torch.zeros(proposals, 256, 7, 7, requires_grad=True)
        boxes = heads.box_predictor(heads.box_head(regions))
        regions = torch.zeros(masks, 256, 14, 14, requires_grad=True)
        outputs = (*logits, *deltas, *boxes, heads.mask_head.layers(regions))
        return torch.stack([output.sum() for output in outputs]).sum()

    large = "Cityscapes" in config
    with FlopCounterMode(display=False) as training:
        forward(*((928, 1856) if large else (736, 960)), proposals=512, masks=128).backward()
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        forward(*((1024, 2048) if large else (800, 1088)), proposals=1000, masks=100)
    return training.get_total_flops() / 1e9, evaluation.get_total_flops() / 1e9


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (29, "less than a minute"),
        (100, "about a minute"),
        (120, "about 2 minutes"),
        (7199, "about 120 minutes"),
        (7200, "about 2 hours"),
        (2 * 86400, "about 2 days"),
        (1234.4 * 86400, "about 1,234 days"),
    ],
)
def test_duration_is_rounded_to_its_largest_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_existing_conversion_is_verified_before_it_is_used(
    checkpoint: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: CAPSYS
) -> None:
    (command.folder / "checkpoint.pth").symlink_to(checkpoint)
    monkeypatch.setattr(evaluate, "verify", verify)
    command.out.mkdir()
    (command.out / "mmseg.pth").touch()
    assert command.run("--only", "voc12aug") == 2
    assert f"{command.out}/mmseg.pth" in capsys.readouterr().err
    assert not list(command.out.rglob("log.txt"))


def test_folder_of_another_checkpoint_is_refused(command: Command, capsys: CAPSYS) -> None:
    assert command.run() == 0
    error = run_expecting_usage_error(evaluate.main, ["other.pth", *command.argv()[1:]], capsys)
    assert "contains the evaluation of another checkpoint" in error


def test_finished_run_with_other_options_is_refused(command: Command, capsys: CAPSYS) -> None:
    options = ("--segmentation-options", "train_cfg.max_iters=9")
    assert command.run("--only", "voc12aug", *options) == 0
    for flags in ((), (*options, "--max-val-images", "10")):
        error = run_expecting_usage_error(evaluate.main, command.argv("--only", "voc12aug", *flags), capsys)
        assert "voc12aug/seed_0 has the recipe 'changed: train_cfg.max_iters=9'; use another --out" in error
    before = command.rows()
    assert command.run("--only", "coco", "--detection-options=--auto-scale") == 0  # of which there is no run yet
    assert command.rows()["coco", "box AP"]["recipe"] == "changed: --auto-scale"
    assert command.rows()["voc12aug", "mIoU"] == before["voc12aug", "mIoU"]


CHECKPOINT = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
(folder / "last_checkpoint").touch()
raise SystemExit("interrupted")
"""


def test_unfinished_run_of_another_recipe_is_not_resumed(
    command: Command, capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.programs["voc12aug"] = CHECKPOINT
    assert command.run("--only", "voc12aug") == 1
    del command.programs["voc12aug"]
    started = command.out / "voc12aug/seed_0/started.json"
    record = json.loads(started.read_text())

    def error(*flags: str) -> str:
        return run_expecting_usage_error(evaluate.main, command.argv("--only", "voc12aug", *flags), capsys)

    message = f"{started.parent} contains an unfinished run of another recipe; delete that folder or use another --out"
    assert message in error("--segmentation-options", "train_cfg.max_iters=9")
    started.write_text(json.dumps(record | {"config_sha256": "of an earlier version"}))
    assert message in error()
    started.unlink()
    assert message in error()
    started.write_text(json.dumps(record))
    assert command.run("--only", "voc12aug") == 0
    assert command.rows()["voc12aug", "mIoU"]["recipe"] == "released"


def test_unfinished_classification_is_not_resumed_with_other_options(command: Command, capsys: CAPSYS) -> None:
    command.programs["inat19"] = CHECKPOINT.replace("last_checkpoint", "current.pth")
    assert command.run("--only", "inat19") == 1
    argv = command.argv("--only", "inat19", "--classification-options=--epochs 1")
    assert "contains an unfinished run of another recipe" in run_expecting_usage_error(evaluate.main, argv, capsys)


def test_options_of_a_run_that_failed_before_its_first_checkpoint_can_be_mended(command: Command) -> None:
    command.programs["coco"] = "raise SystemExit('train_net.py: KEY VALUE: Non-existent config key: SOLVER.X')"
    assert command.run("--only", "coco", "--detection-options", "SOLVER.X 9") == 1
    assert command.run("--only", "voc12aug") == 0
    assert command.rows()["coco", "box AP"]["recipe"] == "changed: SOLVER.X=9"
    del command.programs["coco"]
    assert command.run("--only", "coco", "--detection-options", "SOLVER.MAX_ITER 9") == 0
    assert command.rows()["coco", "box AP"]["recipe"] == "changed: SOLVER.MAX_ITER=9"


def test_checksum_of_a_config_depends_on_its_bases(tmp_path: Path) -> None:
    base, config = tmp_path / "base.yaml", tmp_path / "config.yaml"
    base.write_text("a: 1")
    config.write_text("# config.yaml\n_BASE_: base.yaml")
    before = compute_config_checksum(config)
    assert before == compute_config_checksum(config)
    base.write_text("a: 2")
    assert before != compute_config_checksum(config)


def test_max_val_images_applies_to_all_but_cityscapes_instances(without_gpu: Command, capsys: CAPSYS) -> None:
    names = ("voc12aug", "coco", "cityscapes_instances")
    images = {"detection/coco/val2017": 9, "detection/cityscapes/leftImg8bit/val/x": 11}
    for folder, count in images.items():
        path = without_gpu.folder / folder
        path.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (path / (f"{number}.jpg" if "coco" in folder else f"{number}_leftImg8bit.png")).touch()
    assert without_gpu.run("--device", "cpu", "--only", *names, "--max-val-images", "5") == 0
    output = " ".join(capsys.readouterr().out.split())
    for plan in ("6 x 5 about", "coco 1 90,000 x 16 1 x 5 about", "cityscapes_instances 1 24,000 x 8 1 x 11 about"):
        assert plan in output
    reason = "--max-val-images has no effect, because detectron2 evaluates Cityscapes on all images only"
    assert f"cityscapes_instances: {reason}" in output
    rows = without_gpu.rows()
    assert rows["voc12aug", "mIoU"]["recipe"] == rows["coco", "box AP"]["recipe"] == "changed: --max-val-images=5"
    assert rows["cityscapes_instances", "mask AP"]["recipe"] == "this project's"


def test_damaged_list_of_images_is_named_before_the_runs(without_gpu: Command, capsys: CAPSYS) -> None:
    argv = without_gpu.argv("--only", "inat19", "--device", "cpu")
    path = without_gpu.folder / "classification/inat19/val2019.json"  # which is empty
    error = run_expecting_usage_error(evaluate.main, argv, capsys)
    assert f"{path}: damaged, it lists no images; download it again" in error
    assert not without_gpu.out.exists()


def test_commands_are_the_published_ones(tmp_path: Path) -> None:
    args = evaluate._parse_args(["ckpt.pth", "--out", str(tmp_path), "--gpus", "8"])
    encoder = EncoderWeights({}, "resnet50", {"method": "slotfa"})
    given = parse_options("detection", "--auto-scale SOLVER.MAX_ITER 9 SOLVER.STEPS '(5, 7)'")
    options = add_max_val_images(FINE_TUNINGS["coco"], given, 10)
    run = FineTuningRun("coco", 1, tmp_path / "coco/seed_1", options, RunLength(9))
    command = build_command(args, run, encoder)
    assert command[-4:] == ["SOLVER.MAX_ITER", "9", "SOLVER.STEPS", "(5, 7)"]
    line = " ".join(command)
    assert "train_net.py --config-file" in line
    assert "COCO_R_50_FPN_1x_SlotFA.yaml --num-gpus 8 --max-val-images 10 --auto-scale MODEL.WEIGHTS" in line
    assert f"OUTPUT_DIR {tmp_path}/coco/seed_1/run SEED 1 SOLVER" in line
    run = FineTuningRun("voc12aug", 0, tmp_path / "voc12aug/seed_0", {}, RunLength(9))
    (run.folder / "run").mkdir(parents=True)
    (run.folder / "run/last_checkpoint").touch()
    published = f"{VOC_CONFIG} {tmp_path}/mmseg.pth 8 --work-dir {run.folder}/run --seed 0 --resume"
    assert " ".join(build_command(args, run, encoder)).endswith(published)
    given = parse_options("segmentation", "a.b=1 c=(2,3)")
    run = replace(run, options=add_max_val_images(FINE_TUNINGS["voc12aug"], given, 10))
    line = " ".join(build_command(args, run, encoder))
    assert line.endswith("--seed 0 --max-val-images 10 --resume --cfg-options a.b=1 c=(2,3)")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("coco_vit", "train_net.py --config-file CONFIGS/COCO_ViT_S_FPN_1x_GTSA.yaml --num-gpus 8 MODEL.WEIGHTS"),
        ("ade20k_vit", "mim_dist_train.sh CONFIGS/ade20k/fpn_vit-s16_512x512_40k_ade20k.py OUT/mmseg.pth 8 --work-dir"),
    ],
)
def test_commands_of_gtsa_name_its_configs(name: str, command: str, tmp_path: Path) -> None:
    args = evaluate._parse_args(["ckpt.pth", "--out", str(tmp_path), "--gpus", "8"])
    run = FineTuningRun(name, 0, tmp_path / name / "seed_0", {}, RunLength(9))
    line = " ".join(build_command(args, run, EncoderWeights({}, "vit_small_patch16_224", {"method": "gtsa"})))
    configs = str(ROOT / "transfer" / FINE_TUNINGS[name].task / "configs")
    assert command.replace("CONFIGS", configs).replace("OUT", str(tmp_path)) in line


@pytest.mark.parametrize(
    ("gpus", "launcher", "device"),
    [(0, "", "cpu"), (1, "", "cuda"), (8, " -m torch.distributed.run --standalone --nproc-per-node=8", "cuda")],
)
def test_classification_command_is_the_published_one(gpus: int, launcher: str, device: str, tmp_path: Path) -> None:
    args = evaluate._parse_args(["ckpt.pth", "--out", str(tmp_path)])
    args.gpus = gpus
    options = add_max_val_images(FINE_TUNINGS["inat19"], parse_options("classification", "--epochs 1"), 10)
    run = FineTuningRun("inat19", 2, tmp_path / "inat19/seed_2", options, RunLength(9))
    folder = ROOT / "transfer/classification"
    assert " ".join(build_command(args, run, EncoderWeights({}, "resnet18", {}))) == (
        f"{sys.executable}{launcher} {folder}/finetune.py {tmp_path}/timm.pth --dataset inat19 "
        f"--data-dir {folder}/data/inat19 --output-dir {run.folder}/run --seed 2 --auto-resume --device {device} "
        "--max-val-images 10 --epochs 1"
    )


RESNET50_ROWS = {name for name, fine_tuning in FINE_TUNINGS.items() if fine_tuning.arch == "resnet50"}
VIT_ROWS = {"coco_vit", "ade20k_vit"}


@pytest.mark.parametrize(
    ("arch", "skipped"),
    [
        ("resnet50", VIT_ROWS),
        ("vit_small_patch16_224", RESNET50_ROWS),
        ("vit_base_patch16_224", VIT_ROWS | RESNET50_ROWS),
        ("vit_small_patch8_224", VIT_ROWS | RESNET50_ROWS),
        ("resnet18", VIT_ROWS | RESNET50_ROWS),
    ],
)
def test_fine_tunings_for_other_architectures_are_skipped(
    arch: str, skipped: set[str], command: Command, capsys: CAPSYS
) -> None:
    command.arch = arch
    assert command.run("--only", *FINE_TUNINGS) == 0
    output = capsys.readouterr().out
    for name, fine_tuning in FINE_TUNINGS.items():
        rows = [row for (row_name, _), row in command.rows().items() if row_name == name]
        reason = f"the config is for {fine_tuning.arch}, and the encoder is {arch}"
        assert (f"skipped {name}: {reason}\n" in output) == (name in skipped)
        assert {row["note"] for row in rows} <= ({f"skipped: {reason}"} if name in skipped else NO_NOTES)


NO_NOTES = {"", "the run has no such metric"}


def test_encoder_that_no_requested_config_is_for_is_refused(command: Command, capsys: CAPSYS) -> None:
    command.arch = "vit_base_patch16_224"
    assert command.run("--only", "coco", "coco_vit") == 2
    error = capsys.readouterr().err
    assert error.endswith("no fine-tuning can run: none of these configs is for vit_base_patch16_224\n")
    assert not command.out.exists()


@pytest.mark.parametrize(
    ("arch", "published", "source"),
    [
        (
            "resnet50",
            {("coco", "box AP"): 41.0, ("coco", "mask AP"): 37.0},
            "SlotCon, 800 epochs on COCO (arXiv 2205.15288)",
        ),
        (
            "vit_small_patch16_224",
            {
                ("coco_vit", "box AP"): 35.8,
                ("coco_vit", "mask AP"): 33.5,
                ("ade20k_vit", "mIoU"): 30.6,
                ("inat19", "top-1"): 59.7,
            },
            "GTSA, ViT-S/16, 100 epochs on COCO (arXiv 2304.08014)",
        ),
    ],
)
def test_published_numbers_are_those_of_the_architecture(
    arch: str, published: dict[tuple[str, str], float], source: str, command: Command
) -> None:
    command.arch = arch
    names = ("coco", "cityscapes_instances", "coco_vit", "ade20k_vit", "inat19")
    assert command.run("--only", *names) == 0
    rows = command.rows()
    assert {key: row["published"] for key, row in rows.items() if row["published"]} == published
    assert {row["published_by"] for row in rows.values()} == {source, None}
    text = (command.out / "results.md").read_text()
    assert text.endswith(f"\n\npublished: {source}\n")
    options = ("--out", str(command.folder / "other"), "--classification-options=--epochs 1", "--only", "inat19")
    assert command.run(*options) == 0
    table = (command.folder / "other/results.md").read_text()
    assert "| this project's, changed: --epochs=1 |" in table
    assert "published: " not in table


@pytest.mark.usefixtures("sigterm_handler")
def test_vit_is_fine_tuned_on_labeled_images(
    command: Command, tmp_path: Path, capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fine-tuning is that of the published command, but in this process."""

    def run_command(arguments: list[str], _: object) -> int:
        finetune.main(arguments[2:])
        return 0

    monkeypatch.undo()
    make_inat19(tmp_path / "labeled/inat19")
    monkeypatch.setenv("CLASSIFICATION_DATA", str(tmp_path / "labeled"))
    monkeypatch.setattr("transfer.evaluation.runs.run_command", run_command)
    monkeypatch.setattr("transfer.evaluation.plan.measure_throughput", lambda: 100.0)
    weights = untrained_encoder("vit_tiny_patch32_224", seed=0).weights
    torch.save({f"encoder_k.{name}": value for name, value in weights.items()}, tmp_path / "checkpoint.pth")
    options = "--epochs 1 --batch-size 2 --image-size 32 --num-workers 0"
    flags = ("--device", "cpu", "--only", "inat19", "coco_vit", "--max-val-images", "2")
    assert command.run(*flags, f"--classification-options={options}") == 0
    output = capsys.readouterr().out
    assert "timm.pth: features differ by 0" in output
    plan = next(line for line in output.splitlines() if line.startswith("inat19"))
    assert plan.split()[:8] == ["inat19", "1", "132,096", "x", "2", "1", "x", "2"]
    row = command.rows()["inat19", "top-1"]
    assert row["values"] in ([0], [50], [100])
    changes = "--max-val-images=2 --epochs=1 --batch-size=2 --image-size=32 --num-workers=0"
    assert row["recipe"] == f"this project's, changed: {changes}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--gpus", "9"], "--gpus 9: this machine has 8"),
        (["--gpus", "8", "--device", "cpu"], "--gpus 8: --device cpu uses no GPU"),
        (["--gpus", "0"], "--gpus 0: use --device cpu"),
        (["--max-val-images", "0"], "--max-val-images"),
        (["--detection-options=--resume"], "--resume is not supported; only --auto-scale and KEY VALUE pairs"),
        (["--detection-options", "MODEL.WEIGHTS x.pkl"], "MODEL.WEIGHTS cannot be changed"),
        (["--detection-options", "OUTPUT_DIR x"], "OUTPUT_DIR cannot be changed"),
        (["--detection-options", "SOLVER.MAX_ITER 9 SEED 3"], "SEED cannot be changed"),
        (["--segmentation-options", "work_dir=x"], "work_dir cannot be changed"),
        (["--segmentation-options", "load_from=x.pth"], "load_from cannot be changed"),
        (["--segmentation-options", "resume=True"], "resume cannot be changed"),
        (["--segmentation-options", "randomness.seed=3"], "randomness.seed cannot be changed"),
        (["--segmentation-options", "model.backbone.init_cfg.checkpoint=x"], "init_cfg.checkpoint cannot be changed"),
        (["--detection-options", "SOLVER.MAX_ITER"], "SOLVER.MAX_ITER has no value"),
        (["--detection-options", "SOLVER.MAX_ITER 1e3"], "SOLVER.MAX_ITER is '1e3', not a whole number"),
        (["--segmentation-options", "train_cfg.max_iters"], "train_cfg.max_iters is not supported; only KEY=VALUE"),
        (["--segmentation-options", "a='"], "no closing quotation"),
        (["--classification-options=--output-dir x"], "--output-dir cannot be changed"),
        (["--classification-options=--epochs 1 2"], "2 is not supported; only flags of finetune.py"),
        (["--classification-options=--epochs 1 --epochs=2"], "--epochs is given twice; omit one of the two"),
        (["--classification-options", "epochs=1"], "epochs=1 is not supported; only flags of finetune.py"),
        (["--only", "inat19", "--classification-options=--epochs few"], "--epochs is 'few', not a whole number"),
        (["--only", "voc"], "--only"),
    ],
)
def test_usage_error_is_one_line_and_writes_nothing(
    flags: list[str], message: str, command: Command, capsys: CAPSYS
) -> None:
    assert message in run_expecting_usage_error(evaluate.main, command.argv(*flags), capsys)
    assert not command.out.exists()


def test_missing_gpu_is_reported(without_gpu: Command, capsys: CAPSYS) -> None:
    error = run_expecting_usage_error(evaluate.main, without_gpu.argv("--device", "cuda"), capsys)
    assert "--device cuda: no GPU found; use --device cpu" in error


def test_encoder_of_another_architecture_is_refused(tmp_path: Path, capsys: CAPSYS) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "checkpoint.pth")
    argv = [str(tmp_path / "checkpoint.pth"), "--out", str(tmp_path / "out"), "--only", "coco", "voc12aug"]
    error = run_expecting_usage_error(evaluate.main, argv, capsys)
    assert "no fine-tuning can run: the config is for resnet50, and the encoder is resnet18" in error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
