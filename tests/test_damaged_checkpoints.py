"""Damaged checkpoints of every kind, read by every command: refused, or read exactly as the undamaged file."""

import argparse
import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import nn

import main_pretrain
import viz_slots
from models.backbones import Encoder
from models.method import Method
from tests.checkpoint_data import add_prefix, damaged_copies, is_equal
from tests.helpers import TINY
from transfer import convert, encoders, evaluate, framework_networks, verify
from transfer.detection.d2_weights import WeightsFile, read_weights
from transfer.formats import write_converted
from transfer.segmentation import mm_weights
from utils import checkpoint, resume
from utils.errors import UsageError
from utils.run import Run

Reader = Callable[[Path, Run[Method]], Any]


class TinyResNet(Encoder, nn.Sequential):
    """An encoder with the first names of a ResNet, in the place of every ResNet."""

    width, stride = 6, 8

    def __init__(self, *_options: object) -> None:
        layers = {"conv1": nn.Conv2d(3, 6, 8, 8, bias=False), "bn1": nn.BatchNorm2d(6), "relu": nn.ReLU()}
        super().__init__(OrderedDict(layers))


@pytest.fixture(scope="module", autouse=True)
def small_files() -> Iterator[None]:
    """Build small networks of this project, whose files are small, and do not wait for the disk."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in ("models.slotcon", "transfer.encoders"):
            monkeypatch.setattr(f"{module}.build_encoder", TinyResNet)
        monkeypatch.setattr(framework_networks, "DEPTHS", {})  # the frameworks have no such network
        monkeypatch.setattr(mm_weights, "_shapes", lambda _: TinyResNet().state_dict())
        monkeypatch.setattr(os, "fsync", lambda _: None)
        encoders._encoder_shapes.cache_clear()
        yield
    encoders._encoder_shapes.cache_clear()


@pytest.fixture(scope="module")
def run(small_files: None, tmp_path_factory: pytest.TempPathFactory) -> Run[Method]:
    """A run after one step."""
    sizes = ["--dim-hidden", "8", "--dim-out", "4", "--num-prototypes", "5"]
    folder = tmp_path_factory.mktemp("run")
    args = main_pretrain.parse_args(["--data-dir", ".", "--output-dir", str(folder), *TINY, *sizes])
    run = main_pretrain.build_run(args, torch.device("cpu"), 16)
    for parameter in run.method.parameters():
        parameter.grad = torch.rand_like(parameter)
    run.optimizer.step()
    run.method.encoder_k.load_state_dict({k: v + 1 for k, v in run.method.encoder_q.state_dict().items()})
    return run


@pytest.fixture(scope="module")
def files(run: Run[Method], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small checkpoints of every kind."""
    folder = tmp_path_factory.mktemp("files")
    resume.save(run, 2, 1)
    (Path(run.args.output_dir) / "ckpt_epoch_1.pth").rename(folder / "run.pth")
    model = add_prefix("module.", run.method.state_dict())
    torch.save({"args": argparse.Namespace(arch="resnet50"), "model": model, "epoch": 800}, folder / "released.pth")
    encoder = encoders.read_encoder(folder / "run.pth")
    for name, target in (
        ("torchvision.pth", "torchvision"),
        ("converted.safetensors", "safetensors"),
        ("d2.pkl", "detectron2"),
    ):
        write_converted(folder / name, encoder, target)
    write_converted(Path(run.args.output_dir) / "source.pth", encoder, "torchvision")
    state = {"state_dict": add_prefix("backbone.", encoder.weights), "meta": {"iter": 3}}
    torch.save(state, folder / "fine_tuned.pth")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def damaged(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """144 damaged copies, each with the undamaged file."""
    pairs = []
    for original in files:
        for content in damaged_copies(original.read_bytes(), 12):
            path = tmp_path_factory.mktemp("damaged") / original.name
            path.write_bytes(content)
            pairs.append((path, original))
    return pairs


# What each command reads from a file.


def read_resume(path: Path, run: Run[Method]) -> Any:
    resume.restore(run, path)
    return copy.deepcopy([run.method.state_dict(), run.optimizer.state_dict()])


def read_init(path: Path, run: Run[Method]) -> Any:
    for value in run.method.state_dict().values():
        value.zero_()
    return copy.deepcopy([checkpoint.initialize_from(run.method, path), run.method.state_dict()])


def read_convert(path: Path, run: Run[Method]) -> Any:
    out = Path(run.args.output_dir) / "out.pth"
    convert.convert(convert._parse_args([str(path), str(out), "--overwrite"], None))
    state = torch.load(out, weights_only=True)
    del state["provenance"]["source_sha256"]
    return state


def read_verify(path: Path, run: Run[Method]) -> Any:
    return verify.verify(Path(run.args.output_dir) / "source.pth", path, None, torch.ones(1, 3, 16, 16))


def read_viz(path: Path, _: Run[Method]) -> Any:
    args = viz_slots.parse_args(["--model-path", str(path)])
    model = viz_slots.load_model(args, checkpoint.load(path, "--model-path"))
    return (model.slots or model.encoder).state_dict()


def read_evaluate(path: Path, run: Run[Method]) -> Any:
    """Stop after the checkpoint is read."""

    def read_and_stop(*args: Any) -> None:
        raise StopIteration(encoders.read_encoder(*args).weights)

    with patch.object(evaluate, "read_encoder", read_and_stop):
        try:
            evaluate.main([str(path), "--out", f"{run.args.output_dir}/evaluation"])
        except StopIteration as stop:
            return stop.value


class Backbone(dict[str, Any]):
    type = "ResNet"


def read_pretrained(path: Path, _: Run[Method]) -> Any:
    cfg = argparse.Namespace(model=argparse.Namespace(backbone=Backbone()))
    return mm_weights.read_pretrained(path, cfg)[0]


ENCODERS = {"run.pth", "released.pth", "torchvision.pth", "converted.safetensors", "d2.pkl", "fine_tuned.pth"}
READERS: dict[str, tuple[Reader, set[str]]] = {
    "--resume": (read_resume, {"run.pth"}),
    "--init": (read_init, ENCODERS),
    "convert": (read_convert, ENCODERS),
    "convert --verify": (read_verify, ENCODERS),
    "viz_slots": (read_viz, ENCODERS),
    "probes": (lambda path, _: encoders.load_encoder(path).state_dict(), ENCODERS),
    "detection": (lambda path, _: read_weights(WeightsFile("MODEL.WEIGHTS", path, False)).tensors, ENCODERS),
    "segmentation": (read_pretrained, {"torchvision.pth"}),
    "test of a segmentation": (
        lambda path, _: mm_weights.read_fine_tuned(path, "CHECKPOINT"),
        {"fine_tuned.pth"},
    ),
    "evaluate": (read_evaluate, ENCODERS),
}
"""How every command reads a checkpoint, and the files that it takes."""


class Outcome(NamedTuple):
    """What a command reads from a file, or why it refuses the file."""

    content: Any
    reason: str


def read(reader: Reader, path: Path, run: Run[Method], capsys: pytest.CaptureFixture[str]) -> Outcome:
    try:
        return Outcome(reader(path, run), "")
    except UsageError as error:
        return Outcome(None, str(error))
    except SystemExit:
        return Outcome(None, capsys.readouterr().err)


@pytest.mark.parametrize("name", READERS)
def test_every_command_refuses_a_damaged_file_or_reads_it_as_the_undamaged_one(
    name: str,
    run: Run[Method],
    files: list[Path],
    damaged: list[tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    reader, accepted = READERS[name]
    expected = {path: read(reader, path, run, capsys) for path in files}
    assert {path.name for path in files if not expected[path].reason} == accepted
    for path, original in damaged:
        content, reason = read(reader, path, run, capsys)
        if reason:
            assert str(path) in reason
        else:
            assert is_equal(content, expected[original].content), path
