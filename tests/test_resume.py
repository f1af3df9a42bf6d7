"""utils/resume.py: a resumed run repeats the uninterrupted one; runs are never overwritten or changed silently."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main_pretrain
from tests.helpers import (
    METHOD_FLAGS,
    TINY,
    build_small_vit,
    read_metrics,
    read_weights,
    run_expecting_usage_error,
    use_small_encoder,
)
from utils.resume import check_changes

Tiny = Callable[..., list[str]]
pytestmark = pytest.mark.usefixtures("small_encoder")


@pytest.fixture(scope="module")
def original_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    argv = ["--dataset", "folder", "--data-dir", str(images), "--output-dir", str(folder), *TINY, "--save-freq", "1"]
    with use_small_encoder():
        main_pretrain.main(argv)
    return folder


@pytest.fixture
def finished_run(original_run: Path, tmp_path: Path) -> Path:
    """A copy of a run of two epochs in the folder of `tiny`."""
    return Path(shutil.copytree(original_run, tmp_path / "run"))


@pytest.mark.parametrize(
    "flags",
    [METHOD_FLAGS["slotcon"], METHOD_FLAGS["slotfa_encoder"], ["--optimizer", "adamw", "--amp", "fp16"]],
    ids=" ".join,
)
def test_a_resumed_run_equals_the_uninterrupted_one(flags: list[str], tiny: Tiny, tmp_path: Path) -> None:
    assert_resumed_run_equals_the_uninterrupted_one(flags, tiny, tmp_path)


def test_stochastic_depth_of_a_resumed_run_is_that_of_the_uninterrupted_one(tiny: Tiny, tmp_path: Path) -> None:
    flags = [*METHOD_FLAGS["gtsa"], "--drop-path", "0.5", "--accum-steps", "2", "--batch-size", "4"]
    with use_small_encoder(build_small_vit):
        assert_resumed_run_equals_the_uninterrupted_one(flags, tiny, tmp_path)


def assert_resumed_run_equals_the_uninterrupted_one(flags: list[str], tiny: Tiny, tmp_path: Path) -> None:
    """Bit for bit; the interrupted run had got further than its last checkpoint, and had other loader workers."""
    flags = [*flags, "--epochs", "3", "--save-freq", "1", "--print-freq", "1"]
    main_pretrain.main(tiny(*flags, "--num-workers", "1"))
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(run / "ckpt_epoch_1.pth", resumed / "current.pth")
    shutil.copy(run / "metrics.jsonl", resumed)
    main_pretrain.main([*tiny(*flags), "--output-dir", str(resumed), "--auto-resume"])
    assert "resumed after epoch 1" in (resumed / "log.txt").read_text()
    states = [torch.load(folder / "current.pth", weights_only=True) for folder in (run, resumed)]
    for part in ("model", "optimizer", "scaler"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=0, atol=0)
    timing = ("speed/images_per_second", "speed/data_wait", "speed/memory_gib")
    losses = [[{k: v for k, v in m.items() if k not in timing} for m in read_metrics(f)] for f in (run, resumed)]
    # Which prototypes were used before the interruption is not part of a checkpoint.
    losses = [[{k: v for k, v in m.items() if k != "slots/prototypes_used"} for m in run] for run in losses]
    assert losses[0] == losses[1]


def test_a_finished_run_is_not_trained_further(finished_run: Path, tiny: Tiny) -> None:
    before = (finished_run / "ckpt_epoch_2.pth").read_bytes()
    (finished_run / "current.pth").unlink()  # then it is the last epoch's that is resumed
    main_pretrain.main(tiny("--auto-resume", "--save-freq", "1"))
    assert (finished_run / "ckpt_epoch_2.pth").read_bytes() == before
    assert "resumed after epoch 2" in (finished_run / "log.txt").read_text()


def test_a_run_is_not_overwritten(finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    assert "--auto-resume" in run_expecting_usage_error(main_pretrain.main, tiny(), capsys)
    elsewhere = shutil.copy(finished_run / "current.pth", finished_run.parent / "elsewhere.pth")
    assert "holds a run" in run_expecting_usage_error(main_pretrain.main, tiny("--resume", str(elsewhere)), capsys)
    assert {path: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before
    for checkpoint in finished_run.glob("*.pth"):
        checkpoint.unlink()
    assert "holds a run" in run_expecting_usage_error(main_pretrain.main, tiny(), capsys)


def test_changes_of_the_result_have_to_be_allowed(
    finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--auto-resume", "--epochs", "3", "--base-lr", "2", "--print-freq", "1"]
    line = run_expecting_usage_error(main_pretrain.main, tiny(*changes), capsys)
    assert all(word in line for word in ("--base-lr 1.0 -> 2.0", "--epochs 2 -> 3", "--allow-changes"))
    assert "print-freq" not in line
    main_pretrain.main(tiny(*changes, "--allow-changes"))
    assert (finished_run / "ckpt_epoch_3.pth").exists()
    assert "changed: --base-lr 1.0 -> 2.0" in (finished_run / "log.txt").read_text()


def test_arguments_without_effect_on_the_result_may_change() -> None:
    old = {"compile": False, "num_workers": 8, "data_dir": "a", "decode": "cpu", "output_dir": "x", "processes": 1}
    new = old | {"compile": True, "num_workers": 2, "data_dir": "b", "output_dir": "y"}
    assert check_changes(old, new, allow=False) == [
        "changed: --compile False -> True",
        "changed: --num-workers 8 -> 2",
        "changed: --data-dir a -> b",
    ]
    for change, message in (({"decode": "gpu"}, "--decode cpu -> gpu"), ({"processes": 2}, "processes 1 -> 2")):
        with pytest.raises(main_pretrain.UsageError, match=message):
            check_changes(old, new | change, allow=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-prototypes", "9"], r" and should be (9, 16)|(1, 8) and should be (1, 9)"),
        (["--group-loss-weight", "1"], "its optimizer has other parameters"),
        (["--method", "slotfa"], "--method slotcon -> slotfa: cannot change"),
    ],
)
def test_a_run_of_another_method_or_size_is_not_resumed(
    flags: list[str], message: str, finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny("--auto-resume", "--allow-changes", *flags)
    line = run_expecting_usage_error(main_pretrain.main, argv, capsys)
    assert any(part in line for part in message.split("|"))


def test_a_checkpoint_without_an_optimizer_is_not_resumed(
    finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(finished_run / "current.pth", weights_only=True)
    del state["optimizer"]
    torch.save(state, finished_run / "current.pth")
    line = run_expecting_usage_error(main_pretrain.main, tiny("--auto-resume"), capsys)
    assert "not a checkpoint of this project" in line


def test_values_that_are_not_finite_are_not_resumed(
    finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(finished_run / "current.pth", weights_only=True)
    state["model"]["grouping_q.slot_embed.weight"][3, 2] = float("inf")
    torch.save(state, finished_run / "current.pth")
    line = run_expecting_usage_error(main_pretrain.main, tiny("--auto-resume"), capsys)
    assert "current.pth: model: grouping_q.slot_embed.weight holds values that are not finite" in line


def test_earlier_checkpoint_than_a_damaged_one_is_resumed(
    finished_run: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    with (finished_run / "current.pth").open("r+b") as file:
        file.truncate(5000)
    line = run_expecting_usage_error(main_pretrain.main, tiny("--auto-resume"), capsys)
    assert line.endswith("; replace --auto-resume by --resume with an earlier ckpt_epoch_N.pth\n")
    main_pretrain.main(tiny("--resume", str(finished_run / "ckpt_epoch_1.pth")))
    assert "resumed after epoch 1" in (finished_run / "log.txt").read_text()


def test_an_incomplete_line_of_metrics_is_dropped(finished_run: Path, tiny: Tiny) -> None:
    before = (finished_run / "metrics.jsonl").read_text()
    with (finished_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    main_pretrain.main(tiny("--auto-resume", "--save-freq", "1"))
    assert (finished_run / "metrics.jsonl").read_text() == before


def test_an_interrupted_run_says_how_to_continue(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_pretrain, "train_step", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        main_pretrain.main(tiny())
    assert exit_info.value.code == 130
    assert "--auto-resume" in capsys.readouterr().err.splitlines()[-1]


def test_start_epoch_starts_later_from_other_weights(finished_run: Path, tiny: Tiny, tmp_path: Path) -> None:
    argv = tiny(
        "--init", str(finished_run / "current.pth"), "--start-epoch", "2", "--output-dir", str(tmp_path / "new")
    )
    main_pretrain.main([*argv, "--print-freq", "1"])
    assert [record["step"] for record in read_metrics(tmp_path / "new")] == [3, 4]
    assert json.loads((tmp_path / "new/config.json").read_text())["args"]["start_epoch"] == 2
    names = read_weights(finished_run / "current.pth").keys()
    assert read_weights(tmp_path / "new/current.pth").keys() == names


def test_full_disk_at_the_start_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SystemExit, match="2"):
        main_pretrain.main(tiny())
    config = tmp_path / "run" / "config.json"
    assert f"--output-dir {config}: cannot be written (No space left on device); use" in capsys.readouterr().err
    assert not config.exists()
