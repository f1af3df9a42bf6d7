"""Whole runs of the pre-training command: what it writes, and two processes."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data.datasets
import main_pretrain
from data.demo import make_demo
from tests.helpers import TINY, read_metrics
from utils import distributed


def assert_complete(folder: Path, epochs: int) -> None:
    """Check that the run folder holds everything that the README promises."""
    config = json.loads((folder / "config.json").read_text())
    assert config["plan"]["peak_lr"] == config["args"]["base_lr"] * config["plan"]["effective_batch"] / 256
    assert config["versions"].keys() >= {"python", "torch", "torchvision", "numpy", "pillow"}
    assert "step" in (folder / "log.txt").read_text()
    board = EventAccumulator(str(folder)).Reload()
    assert {"views", "slots"} <= set(board.Tags()["images"])
    assert {"loss", "loss/group", "optim/lr", "slots/per_image"} <= set(board.Tags()["scalars"])
    assert board.Scalars("optim/lr")[-1].step == 1000 * epochs
    assert Image.open(folder / "slots.png").width > 100
    assert (folder / "current.pth").samefile(folder / f"ckpt_epoch_{epochs}.pth")
    state = torch.load(folder / "current.pth", weights_only=True)
    assert state.keys() == {"args", "epoch", "step", "model", "optimizer", "scaler", "versions"}
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not list(folder.glob(".*"))


def test_a_run_on_the_demo_writes_a_complete_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.datasets, "make_demo", partial(make_demo, train=8, val=1))
    folder = tmp_path / "run"
    main_pretrain.main(["--dataset", "demo", "--data-dir", str(tmp_path), "--output-dir", str(folder), *TINY])
    assert_complete(folder, epochs=2)
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(r"^loss +\d+\.\d+ -> \d+\.\d+$", output.err, re.MULTILINE)
    assert output.err.splitlines()[-1].endswith(f"tensorboard --logdir {folder}")


def test_two_processes_train_one_model(images: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--dataset", "folder", "--data-dir", str(images), "--output-dir", str(tmp_path / "run"), *TINY]
    command = [*torchrun, main_pretrain.__file__, *flags, "--epochs", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert "batch norm not synchronized" in result.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["plan"]["processes"] == 2
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2
    assert_complete(tmp_path / "run", epochs=1)


def test_ranks_other_than_0_report_an_error_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun stops all ranks as soon as one exits, and the first line should be that of rank 0."""
    waits: list[Any] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for rank, expected in ((0, "no such folder\n"), (1, "rank 1: no such folder\n")):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as exit_info:
            distributed.exit_with_error("no such folder")
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.endswith(f": {expected}")
        assert len(waits) == rank
