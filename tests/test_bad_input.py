"""Mistakes: one line that names the flag and the cure, status 2, nothing overwritten."""

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

import main_pretrain
from tests.helpers import run_expecting_usage_error
from utils import checkpoint
from utils.errors import UsageError

Tiny = Callable[..., list[str]]


mistake = partial(run_expecting_usage_error, main_pretrain.main)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--arch", "resnet51"], "--arch"),
        (["--arch", "resnet18", "--output-stride", "16"], "--output-stride"),
        (["--method", "moco"], "--method"),
        (["--dataset", "VOC"], "--dataset"),
        (["--dataset", "COCO"], "train2017"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "17"], "--batch-size"),
        (["--accum-steps", "3"], "--accum-steps"),
        (["--base-lr", "fast"], "--base-lr"),
        (["--teacher-momentum", "1.5"], "--teacher-momentum"),
        (["--resume", "nowhere.pth"], "--resume nowhere.pth"),
        (["--init", "nowhere.pth"], "--init nowhere.pth"),
        (["--epoch", "3"], "--epoch"),
        (["--method"], "--method"),
        (["--resume", "nowhere.pth", "--auto-resume"], "--resume nowhere.pth"),
        (["--resume", __file__, "--init", __file__], "use one of them"),
        (["--start-epoch", "3"], "--start-epoch"),
        (["--base-lr", "inf"], "--base-lr"),
        (["--base-lr", "nan"], "--base-lr"),
        (["--batch-size", "1", "--image-size", "32"], "--batch-size"),
        (["--output-dir", __file__], "--output-dir"),
        pytest.param(
            ["--device", "cuda"],
            "--device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
    ],
)
def test_a_wrong_flag_is_named_and_nothing_is_written(
    flags: list[str], named: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = mistake(tiny(*flags), capsys)
    assert named in line
    assert not (tmp_path / "run").exists()


def test_a_folder_without_images_is_named(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert "no images" in mistake(tiny("--data-dir", str(tmp_path / "empty")), capsys)


def test_more_processes_than_images_in_a_batch(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from utils.config import make_plan

    with pytest.raises(UsageError, match=r"--batch-size 8.* 16 processes"):
        make_plan(main_pretrain.parse_args(tiny()), images=16, world_size=16)


@pytest.fixture
def finished_run(tiny: Tiny, tmp_path: Path) -> Path:
    main_pretrain.main(tiny())
    return tmp_path / "run"


def test_a_run_is_not_overwritten(finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    assert "--auto-resume" in mistake(tiny(), capsys)
    assert {path: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before


def test_a_run_before_its_first_checkpoint_is_not_overwritten(
    finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint_file in finished_run.glob("*.pth"):
        checkpoint_file.unlink()
    assert "holds a run" in mistake(tiny(), capsys)


def test_resuming_from_elsewhere_does_not_overwrite_a_run(
    finished_run: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished_run / "current.pth").rename(tmp_path / "elsewhere.pth")
    assert "holds a run" in mistake(tiny("--resume", str(tmp_path / "elsewhere.pth")), capsys)


def test_without_current_pth_the_latest_checkpoint_is_gone_on_from(finished_run: Path, tiny: Tiny) -> None:
    (finished_run / "current.pth").unlink()
    before = (finished_run / "ckpt_epoch_2.pth").read_bytes()
    main_pretrain.main(tiny("--auto-resume"))
    assert (finished_run / "ckpt_epoch_2.pth").read_bytes() == before
    assert "going on after epoch 2" in (finished_run / "log.txt").read_text()


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(state: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos 60697856 vs 60697752")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.main(tiny())
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--output-dir" in line
    assert "cannot be written" in line
    assert not list((tmp_path / "run").glob("*ckpt*"))
    assert not list((tmp_path / "run").glob(".*ckpt*"))
    assert "cannot be written" in (tmp_path / "run/log.txt").read_text()


def test_an_interrupted_run_says_how_to_go_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_pretrain, "optimize", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.main(tiny())
    assert stopped.value.code == 130
    assert "--auto-resume" in capsys.readouterr().err.splitlines()[-1]


def test_half_a_line_of_metrics_does_not_stop_a_resume(finished_run: Path, tiny: Tiny) -> None:
    with (finished_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    before = (finished_run / "metrics.jsonl").read_text().splitlines()
    main_pretrain.main(tiny("--auto-resume"))
    assert (finished_run / "metrics.jsonl").read_text().splitlines() == before[:-1]


def test_an_optimizer_of_other_parameters_is_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_pretrain.main(tiny("--optimizer", "sgd"))
    off = ["--optimizer", "sgd", "--auto-resume", "--allow-changes", "--group-loss-weight", "1"]
    assert "trained other parameters" in mistake(tiny(*off), capsys)


def test_a_checkpoint_with_parts_missing_is_no_checkpoint(
    finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(finished_run / "current.pth", weights_only=True)
    del state["optimizer"]
    torch.save(state, finished_run / "current.pth")
    assert "not a checkpoint of this project" in mistake(tiny("--auto-resume"), capsys)


def test_changes_of_the_result_have_to_be_allowed(
    finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    line = mistake(tiny("--auto-resume", "--epochs", "3", "--base-lr", "2", "--print-freq", "1"), capsys)
    assert "--base-lr 1.0 -> 2.0" in line
    assert "--epochs 2 -> 3" in line
    assert "--allow-changes" in line
    assert "print-freq" not in line
    main_pretrain.main(tiny("--auto-resume", "--epochs", "3", "--base-lr", "2", "--allow-changes"))
    assert (finished_run / "ckpt_epoch_3.pth").exists()
    log = (finished_run / "log.txt").read_text()
    assert "allow-changes" not in log
    assert "changed: --base-lr 1.0 -> 2.0" in log


def test_a_checkpoint_of_another_shape(finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    wider = tiny("--auto-resume", "--num-prototypes", "9", "--allow-changes")
    line = mistake(wider, capsys)
    assert "(8, 16) there and (9, 16) here" in line or "(1, 8) there and (1, 9) here" in line
    line = mistake(tiny("--init", str(finished_run / "current.pth"), "--arch", "resnet34", "--output-dir", "x"), capsys)
    assert "encoder_q" in line
    assert "--arch" in line


@pytest.mark.parametrize("flag", ["--resume", "--init"])
def test_a_truncated_checkpoint(flag: str, finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (finished_run / "current.pth").read_bytes()
    short = finished_run / "short.pth"
    short.write_bytes(whole[: len(whole) // 2])
    line = mistake(tiny(flag, str(short), "--output-dir", str(finished_run / "new")), capsys)
    assert f"{flag} {short}" in line
    assert not (finished_run / "new").exists()


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("sprung",)  # type: ignore[return-value]


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_pickle_is_refused_and_does_not_run(
    write: Callable[[object, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UsageError, match=r"--init .*trap\.pth"):
        checkpoint.load_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
