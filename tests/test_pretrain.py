"""Whole runs through the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
MAIN = str(ROOT / "main_pretrain.py")
SMALL = ["--arch", "resnet18", "--image-size", "64", "--dim-hidden", "128", "--dim-out", "64", "--num-prototypes", "12"]
SMALL += ["--device", "cpu", "--num-workers", "1", "--warmup-epoch", "1", "--print-freq", "5"]


def command(*words: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*launcher, *words], capture_output=True, text=True, cwd="/", timeout=400)


def pretrain(*flags: object) -> subprocess.CompletedProcess[str]:
    finished = command(MAIN, *map(str, flags))
    assert finished.returncode == 0, finished.stderr
    return finished


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_learned(folder: Path) -> None:
    """The loss fell and more than a third of the prototypes are in use."""
    metrics = records(folder)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.02
    assert metrics[-1]["prototypes_used"] > 1 / 3
    assert metrics[-1]["slots_per_image"] > 1.2


def assert_complete(folder: Path, epochs: int) -> None:
    """Everything that the README promises is in the run folder, and opens."""
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["arch"] == "resnet18"
    assert config["plan"]["peak_lr"] == config["args"]["base_lr"] * config["plan"]["effective_batch"] / 256
    assert "torch" in config["versions"]
    assert "step" in (folder / "log.txt").read_text()
    board = EventAccumulator(str(folder)).Reload()
    assert {"views", "slots"} <= set(board.Tags()["images"])
    assert {"loss/loss_group", "run/lr", "slots/slots_per_image"} <= set(board.Tags()["scalars"])
    assert board.Scalars("run/lr")[-1].step == 1000 * epochs
    assert Image.open(folder / "slots.png").width > 100
    assert set(weights(folder / f"ckpt_epoch_{epochs}.pth")) == set(weights(folder / "current.pth"))
    assert not list(folder.glob(".*"))
    last = records(folder)[-1]
    for name in ("loss", "loss_group", "loss_contrast", "lr", "images_per_second", "data_wait", "memory_gib"):
        assert last[name] > 0 or name == "data_wait", name


def test_a_run_on_the_demo_learns(tmp_path: Path) -> None:
    where = ["--dataset", "demo", "--data-dir", tmp_path, "--output-dir", tmp_path / "run"]
    finished = pretrain(*where, *SMALL, "--batch-size", 32, "--epochs", 2, "--base-lr", 4, "--save-freq", 1)
    assert_learned(tmp_path / "run")
    assert_complete(tmp_path / "run", epochs=2)
    assert re.search(r"^loss +\d\.\d+ -> \d\.\d+$", finished.stderr, re.MULTILINE)
    assert str(tmp_path / "run") in finished.stderr


@pytest.fixture(scope="module")
def photograph_run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """A run on photographs: its flags but for the folder, and its folder."""
    folder = tmp_path_factory.mktemp("photographs")
    flags = ["--data-dir", photographs, *SMALL, "--batch-size", 22, "--epochs", 3, "--base-lr", 4, "--save-freq", 1]
    pretrain(*flags, "--output-dir", folder)
    return flags, folder


def test_a_run_on_photographs_learns(photograph_run: tuple[list[object], Path]) -> None:
    _, folder = photograph_run
    assert_learned(folder)
    assert_complete(folder, epochs=3)


@pytest.mark.parametrize("preset", [[], ["--group-loss-weight", 0.5, "--fa-train-prototypes"]])
def test_slotfa_learns_on_photographs(preset: list[object], photographs: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", photographs, *SMALL, "--batch-size", 22, "--epochs", 2, "--base-lr", 4]
    pretrain("--method", "slotfa", *preset, *flags, "--output-dir", tmp_path)
    assert_learned(tmp_path)
    first, last = records(tmp_path)[0], records(tmp_path)[-1]
    assert last["loss_augmented"] < first["loss_augmented"]
    assert last["loss_group"] < first["loss_group"]
    assert 0.1 < last["assignments_moved"] < 1


def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    photograph_run: tuple[list[object], Path], tmp_path: Path
) -> None:
    flags, folder = photograph_run
    shutil.copy(folder / "ckpt_epoch_1.pth", tmp_path / "current.pth")
    shutil.copy(folder / "metrics.jsonl", tmp_path)  # of an interrupted run that had got further than its checkpoint
    finished = pretrain(*flags, "--output-dir", tmp_path, "--auto-resume", "--num-workers", 0)
    assert "going on after epoch 1" in finished.stderr
    expected, resumed = weights(folder / "current.pth"), weights(tmp_path / "current.pth")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    steps = [record["step"] for record in records(tmp_path)]
    assert steps == [record["step"] for record in records(folder)]


def test_a_finished_run_resumed_is_left_alone(photograph_run: tuple[list[object], Path], tmp_path: Path) -> None:
    flags, folder = photograph_run
    before = (folder / "current.pth").read_bytes()
    pretrain(*flags, "--output-dir", folder, "--auto-resume")
    assert (folder / "current.pth").read_bytes() == before


def test_two_processes_train_one_model(photographs: Path, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    flags = ["--data-dir", photographs, "--dataset", "COCOval", *SMALL, "--batch-size", 20, "--epochs", 1]
    finished = command(MAIN, *map(str, flags), "--output-dir", str(tmp_path), launcher=torchrun)
    assert finished.returncode == 0, finished.stderr
    assert "batch norm of each process on its own" in finished.stderr
    assert json.loads((tmp_path / "config.json").read_text())["plan"]["processes"] == 2
    assert records(tmp_path)[-1]["step"] == 5
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "current.pth").values())


def test_under_torchrun_the_first_line_of_a_mistake_is_rank_0s(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    finished = command(MAIN, "--data-dir", str(tmp_path / "nowhere"), "--device", "cpu", launcher=torchrun)
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if "nowhere" in line or "Traceback" in line]
    assert lines[0] == f"main_pretrain.py: --data-dir {tmp_path / 'nowhere'}: no such folder"


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    finished = command(MAIN, "--data-dir", str(tmp_path / "nowhere"))
    assert finished.returncode == 2
    assert finished.stderr == f"main_pretrain.py: --data-dir {tmp_path / 'nowhere'}: no such folder\n"
    assert finished.stdout == ""


@pytest.mark.parametrize(
    ("launcher", "layout", "prototypes", "epochs"),
    [
        ("slotcon_coco_r50_800ep", "train2017", 256, 800),
        ("slotcon_cocoplus_r50_800ep", "train2017 unlabeled2017", 256, 800),
        ("slotcon_imagenet_r50_100ep", "train/n01440764", 2048, 100),
        ("slotcon_imagenet_r50_200ep", "train/n01440764", 2048, 200),
    ],
)
def test_the_launchers_start_the_published_recipes(
    launcher: str, layout: str, prototypes: int, epochs: int, tmp_path: Path
) -> None:
    for folder in layout.split():
        (tmp_path / folder).mkdir(parents=True)
        for number in range(300):
            (tmp_path / folder / f"{number}.jpg").touch()
    environment = {"DATA": str(tmp_path), "OUT": str(tmp_path / "run"), "GPUS": "1", "MASTER_PORT": free_port()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    finished = subprocess.run(
        [ROOT / "scripts" / f"{launcher}.sh", "--dry-run", "--device", "cpu", "--batch-size", "256"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    images = 300 * len(layout.split())
    assert f"{images} of " in finished.stdout
    assert f"{epochs * (images // 256)} = {epochs} epochs x" in finished.stdout
    assert "learning rate     1 = 1 x 256 / 256, lars" in finished.stdout
    assert f"prototypes        {prototypes}\n" in finished.stdout
    assert not (tmp_path / "run").exists()


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
