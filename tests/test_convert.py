"""Converted encoders: complete and unchanged in every format, loaded by the frameworks, and verified."""

import argparse
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import main_pretrain
from models.backbones import RESNETS
from tests.checkpoint_data import (
    Weights,
    add_prefix,
    assert_equal,
    released_checkpoint,
    resnet18_weights,
    to_half,
    vit_weights,
    without_classifier,
)
from tests.helpers import run_expecting_usage_error
from tests.reference.framework_names import resnet_rows, vit_rows
from transfer import convert
from transfer.encoders import load_encoder, read_encoder
from transfer.formats import FORMATS, write_converted
from utils.errors import UsageError
from utils.resnet_names import detectron2_name, torchvision_name
from utils.vit_names import detectron2_vit_name, mmseg_vit_name, timm_vit_name

Captured = pytest.CaptureFixture[str]
Converted = Callable[[str], Path]
FailingConvert = Callable[..., str]

ROOT = Path(__file__).parents[1]
SUFFIX = {"torchvision": ".pth", "timm": ".pth", "detectron2": ".pkl", "mmseg": ".pth", "safetensors": ".safetensors"}
FRAMEWORKS = ("timm", "mmseg", "detectron2")
"""Those whose own network is compared where it is installed."""
TEACHER, STUDENT = without_classifier(resnet18_weights(1)), without_classifier(resnet18_weights(2))
VIT = without_classifier(vit_weights(1, patch_size=32))
VIT_FORMATS = [target for target in FORMATS if target != "torchvision"]


def convert_file(source: Path, out: Path, *flags: str) -> Path:
    convert.main([str(source), str(out), *flags])
    return out


def read_back(path: Path, target: str) -> tuple[Weights, dict[str, Any]]:
    """Read weights, by torchvision's or timm's names, and provenance without the project's own readers."""
    if target == "detectron2":
        state = pickle.loads(path.read_bytes())
        names = {row.detectron2: row.torchvision for row in resnet_rows(18)}
        names |= {row.detectron2: row.timm for row in vit_rows(192, 12, 32) if row.detectron2}
        return {names[name]: torch.from_numpy(value) for name, value in state["model"].items()}, state["provenance"]
    if target == "safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            provenance = json.loads(file.metadata()["provenance"])
        return safetensors.torch.load_file(path), provenance
    state = torch.load(path, weights_only=True)
    if target == "mmseg" and "cls_token" in state["state_dict"]:
        names = {row.mmseg: row.timm for row in vit_rows(192, 12, 32)}
        return {names[name]: value for name, value in state["state_dict"].items()}, state["provenance"]
    return state["state_dict"], state["provenance"]


def write_again(path: Path, target: str, weights: Weights, provenance: dict[str, Any]) -> None:
    """Write a converted file with other contents, without the project's own writers."""
    if target == "detectron2":
        names = {row.torchvision: row.detectron2 for row in resnet_rows(18)}
        model = {names[name]: value.numpy() for name, value in weights.items()}
        state = {"model": model, "__author__": "they", "matching_heuristics": True, "provenance": provenance}
        path.write_bytes(pickle.dumps(state))
    elif target == "safetensors":
        metadata = {"format": "pt", "provenance": json.dumps(provenance)}
        safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)
    else:
        torch.save({"state_dict": weights, "provenance": provenance}, path)


@pytest.fixture(autouse=True)
def remove_files(tmp_path: Path) -> Iterator[None]:
    """Files of networks are large: none outlives its test."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of files that tests only read."""
    folder = tmp_path_factory.mktemp("converted")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    """A released file with a resnet18 as teacher and another one as student."""
    torch.save(released_checkpoint(to_half(TEACHER), to_half(STUDENT)), folder / "source.pth")
    return folder / "source.pth"


@pytest.fixture(scope="module")
def converted(source: Path, folder: Path) -> Converted:
    """The teacher of `source` for a framework."""

    @cache
    def convert_for(target: str) -> Path:
        return convert_file(source, folder / f"{target}{SUFFIX[target]}", "--to", target)

    return convert_for


@pytest.fixture(scope="module")
def vit_source(folder: Path) -> Path:
    """A released file of GTSA with a ViT as teacher and another one as student."""
    student = without_classifier(vit_weights(2, patch_size=32))
    model = add_prefix("module.momentum_encoder.", VIT) | add_prefix("module.base_encoder.", student)
    torch.save({"args": argparse.Namespace(arch="vit_tiny"), "model": model, "epoch": 100}, folder / "gtsa.pth")
    return folder / "gtsa.pth"


@pytest.fixture(scope="module")
def converted_vit(vit_source: Path, folder: Path) -> Converted:
    """The teacher of `vit_source` for a framework."""

    @cache
    def convert_for(target: str) -> Path:
        return convert_file(vit_source, folder / f"vit_{target}{SUFFIX[target]}", "--to", target)

    return convert_for


@pytest.fixture
def convert_expecting_usage_error(tmp_path: Path, capsys: Captured) -> FailingConvert:
    """Run the command, expect a usage error and unchanged files in `tmp_path`, and return the error's line."""

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}

    def command(*argv: object, target: str | None = None) -> str:
        before = files()
        line = run_expecting_usage_error(lambda words: convert.main(words, target), list(map(str, argv)), capsys)
        assert files() == before
        return line

    return command


# The names of detectron2.


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_tensor_has_the_name_that_detectron2_uses(depth: int) -> None:
    with torch.device("meta"):
        weights = without_classifier(torchvision.models.get_model(f"resnet{depth}").state_dict())
    rows = resnet_rows(depth)
    assert {row.torchvision: row.shape for row in rows} == {name: tuple(value.shape) for name, value in weights.items()}
    for row in rows:
        assert detectron2_name(row.torchvision) == row.detectron2
        assert torchvision_name(row.detectron2) == row.torchvision


@pytest.mark.parametrize("arch", RESNETS)
def test_names_of_detectron2_are_distinct_and_invertible(arch: str) -> None:
    with torch.device("meta"):
        names = list(without_classifier(torchvision.models.get_model(arch).state_dict()))
    renamed = [detectron2_name(name) for name in names]
    assert [torchvision_name(name) for name in renamed] == names
    assert len(set(renamed)) == len(names)


@pytest.mark.parametrize("depth", [18, 50])
def test_reference_names_are_those_of_the_network_that_detectron2_builds(depth: int) -> None:
    assert {row.detectron2: row.shape for row in resnet_rows(depth)} == {
        name: tuple(value.shape) for name, value in detectron2_backbone(depth).bottom_up.state_dict().items()
    }


def detectron2_backbone(depth: int) -> nn.Module:
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    config = get_cfg()
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.BACKBONE.FREEZE_AT = 0
    config.MODEL.RESNETS.DEPTH = depth
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    return build_backbone(config, ShapeSpec(channels=3))


@pytest.mark.parametrize("patch_size", [16, 32])
def test_every_tensor_of_a_vit_has_the_name_that_each_framework_uses(patch_size: int) -> None:
    weights, rows = without_classifier(vit_weights(1, patch_size)), vit_rows(192, 12, patch_size)
    assert {row.timm: row.shape for row in rows} == {name: tuple(value.shape) for name, value in weights.items()}
    for row in rows:
        assert mmseg_vit_name(row.timm) == row.mmseg
        assert timm_vit_name(row.mmseg) == row.timm
        assert detectron2_vit_name(row.timm) == row.detectron2


# What is written.


@pytest.mark.parametrize("target", FORMATS)
def test_every_format_keeps_all_tensors_and_provenance(target: str, source: Path, converted: Converted) -> None:
    weights, provenance = read_back(converted(target), target)
    assert len(weights) == 120
    assert_equal(weights, TEACHER)
    assert provenance == read_encoder(source).provenance | {"format": target}


@pytest.mark.parametrize("target", VIT_FORMATS)
def test_every_format_keeps_the_tensors_of_a_vit_and_provenance(
    target: str, vit_source: Path, converted_vit: Converted
) -> None:
    """All tensors, except for the class token and the final norm that detectron2 does not have."""
    weights, provenance = read_back(converted_vit(target), target)
    left_out = {"cls_token", "norm.weight", "norm.bias"} if target == "detectron2" else set()
    assert_equal(weights, {name: value for name, value in VIT.items() if name not in left_out})
    assert provenance == read_encoder(vit_source).provenance | {"format": target}
    assert (provenance["arch"], provenance["encoder"]) == ("vit_tiny_patch32_224", "teacher")


def test_names_of_a_vit_in_a_detectron2_file_are_complete(converted_vit: Converted) -> None:
    state = pickle.loads(converted_vit("detectron2").read_bytes())
    assert "matching_heuristics" not in state  # with it detectron2 would look for the names in its whole model
    assert isinstance(state["__author__"], str)


def test_detectron2_file_asks_for_the_prefix_of_the_detector(converted: Converted) -> None:
    state = pickle.loads(converted("detectron2").read_bytes())
    assert state["matching_heuristics"] is True
    assert isinstance(state["__author__"], str)  # without it detectron2 takes the file for a list of arrays


def test_student_is_converted_on_request(source: Path, tmp_path: Path, capsys: Captured) -> None:
    out = convert_file(source, tmp_path / "out.pth", "--encoder", "student")
    weights, provenance = read_back(out, "torchvision")
    assert_equal(weights, STUDENT)
    assert provenance["encoder"] == "student"
    expected = f"{out}: 120 tensors of the student's resnet18 after epoch 800, for torchvision\n"
    assert capsys.readouterr().out == expected


def test_run_of_this_project_gives_its_teacher_and_its_student(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    main_pretrain.main(tiny("--teacher-momentum", "0.5", "--epochs", "1", "--warmup-epoch", "0"))
    current = tmp_path / "run" / "current.pth"
    model = torch.load(current, weights_only=True)["model"]
    for which, prefix in (("teacher", "encoder_k."), ("student", "encoder_q.")):
        out = convert_file(current, tmp_path / f"{which}.safetensors", "--encoder", which)
        weights, provenance = read_back(out, "safetensors")
        expected = {name: value for name, value in model.items() if name.startswith(prefix)}
        assert_equal(add_prefix(prefix, weights), expected)
        assert [provenance[name] for name in ("method", "epoch", "encoder")] == ["slotcon", 1, which]


def test_suffix_decides_the_framework_by_default(source: Path, tmp_path: Path) -> None:
    suffixes = {".pkl": "detectron2", ".safetensors": "safetensors", ".pth": "torchvision", ".pt": "torchvision"}
    for suffix, target in suffixes.items():
        assert read_back(convert_file(source, tmp_path / f"out{suffix}"), target)[1]["format"] == target


def test_views_and_shared_tensors_are_written_as_copies(tmp_path: Path) -> None:
    name, counter = "layer4.0.conv1.weight", torch.tensor(5)
    weights = {key: counter if "num_batches" in key else value for key, value in TEACHER.items()}
    larger = torch.zeros(TEACHER[name].numel() + 4_000_000)
    view = larger[: TEACHER[name].numel()].view(TEACHER[name].shape).copy_(TEACHER[name])
    torch.save(weights | {name: view}, tmp_path / "in.pth")
    for target in ("torchvision", "safetensors"):
        out = convert_file(tmp_path / "in.pth", tmp_path / f"out{SUFFIX[target]}", "--to", target)
        assert_equal(read_back(out, target)[0], weights)
        assert out.stat().st_size < sum(value.nbytes for value in TEACHER.values()) + 2**20


# Converted files are checkpoints themselves.


@pytest.mark.parametrize("first", FORMATS)
def test_every_format_is_converted_to_every_other_without_loss(
    first: str, source: Path, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the files are large
    encoder = read_encoder(converted(first))
    for second in FORMATS:
        write_converted(tmp_path / "out", encoder, second)
        weights, provenance = read_back(tmp_path / "out", second)
        assert_equal(weights, TEACHER)
        assert provenance == read_encoder(source).provenance | {"format": second}


def test_command_converts_a_converted_file(converted: Converted, tmp_path: Path, capsys: Captured) -> None:
    out = convert_file(converted("detectron2"), tmp_path / "out.safetensors", "--verify")
    assert_equal(read_back(out, "safetensors")[0], TEACHER)
    assert "120 tensors of the teacher's resnet18 after epoch 800, for safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("target", FORMATS)
def test_converted_file_is_an_encoder_with_the_provenance_of_its_source(
    target: str, source: Path, converted: Converted
) -> None:
    assert_equal(load_encoder(converted(target)).state_dict(), TEACHER)
    encoder = read_encoder(converted(target), "teacher")
    assert encoder.provenance == read_encoder(source).provenance | {"format": target}
    with pytest.raises(UsageError, match="no student in it, its only encoder is the teacher; omit --encoder"):
        read_encoder(converted(target), "student")


@pytest.mark.parametrize("target", VIT_FORMATS)
def test_converted_vit_is_an_encoder_except_for_that_of_detectron2(
    target: str, vit_source: Path, converted_vit: Converted
) -> None:
    if target == "detectron2":
        with pytest.raises(UsageError, match="a ViT of detectron2, without class token and final norm; use the check"):
            read_encoder(converted_vit(target))
    else:
        encoder = read_encoder(converted_vit(target), "teacher")
        assert_equal(encoder.weights, VIT)
        assert encoder.provenance == read_encoder(vit_source).provenance | {"format": target}


def test_detectron2_file_of_another_program_is_read(tmp_path: Path) -> None:
    """As detectron2 converts torchvision's files: without provenance, with a classifier."""
    names = {row.torchvision: row.detectron2 for row in resnet_rows(18)}
    model = {names.get(name, f"stem.{name}"): value.numpy() for name, value in resnet18_weights(1).items()}
    state = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "in.pkl").write_bytes(pickle.dumps(state))
    weights, provenance = read_back(convert_file(tmp_path / "in.pkl", tmp_path / "out.pth", "--verify"), "torchvision")
    assert_equal(weights, TEACHER)
    assert (provenance["source"], provenance["encoder"], provenance["color_order"]) == ("in.pkl", "only", "RGB")


def test_torch_file_with_the_suffix_of_detectron2_is_read(tmp_path: Path) -> None:
    for zip_format in (True, False):
        torch.save(resnet18_weights(1), tmp_path / "in.pkl", _use_new_zipfile_serialization=zip_format)
        assert_equal(read_encoder(tmp_path / "in.pkl").weights, TEACHER)


# The frameworks load it.


def test_torchvision_loads_converted_resnet(converted: Converted) -> None:
    network = torchvision.models.resnet18(num_classes=3)
    weights = torch.load(converted("torchvision"), weights_only=True)["state_dict"]
    mismatch = network.load_state_dict(weights, strict=False)
    assert set(mismatch.missing_keys) == {"fc.weight", "fc.bias"}
    assert not mismatch.unexpected_keys


@pytest.mark.parametrize("target", ["timm", "torchvision", "safetensors"])
def test_timm_loads_converted_resnet(target: str, converted: Converted) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(converted(target)))
    assert_equal(network.state_dict(), TEACHER)


@pytest.mark.parametrize("target", ["timm", "safetensors"])
def test_timm_loads_converted_vit(target: str, converted_vit: Converted) -> None:
    timm = pytest.importorskip("timm")
    options = {"num_classes": 0, "patch_size": 32, "checkpoint_path": str(converted_vit(target))}
    assert_equal(timm.create_model("vit_tiny_patch16_224", **options).state_dict(), VIT)


def test_mmseg_loads_converted_resnet(converted: Converted) -> None:
    mmseg_models = pytest.importorskip("mmseg.models")
    from mmengine.runner.checkpoint import load_checkpoint

    network = mmseg_models.ResNet(depth=18)
    load_checkpoint(network, str(converted("mmseg")), map_location="cpu", strict=True)
    assert_equal(network.state_dict(), TEACHER)


def test_detectron2_loads_converted_resnet_below_the_feature_pyramid(converted: Converted) -> None:
    detector = nn.Module()
    detector.backbone = detectron2_backbone(18)
    from detectron2.checkpoint import DetectionCheckpointer

    DetectionCheckpointer(detector).load(str(converted("detectron2")))
    loaded = detector.backbone.bottom_up.state_dict()
    assert all(torch.equal(loaded[row.detectron2], TEACHER[row.torchvision]) for row in resnet_rows(18))


# --verify passes.


def use_framework(target: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """Skip the test where a framework is not installed, or make it so, and return the words for the network used."""
    if target not in FRAMEWORKS:
        return "this project's network"
    if installed:
        pytest.importorskip(target)
        return f"{target}'s network"
    for name in [name for name in sys.modules if name.split(".")[0] == target]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, target, None)
    return "this project's network"


@pytest.mark.parametrize(
    ("target", "installed"), [(target, True) for target in FORMATS] + [(target, False) for target in FRAMEWORKS]
)
def test_conversion_is_verified_by_an_installed_frameworks_network(
    target: str, installed: bool, source: Path, converted: Converted, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    used = use_framework(target, installed, monkeypatch)
    before = converted(target).stat().st_mtime_ns
    capsys.readouterr()
    convert_file(source, converted(target), "--to", target, "--verify")
    line = capsys.readouterr().out
    assert float(line.removeprefix("verified: features differ by ").split()[0]) <= 1e-5
    assert used in line
    assert ("is not installed" in line) == (not installed)
    assert converted(target).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("target", "installed"), [(target, True) for target in VIT_FORMATS] + [(target, False) for target in FRAMEWORKS]
)
def test_conversion_of_a_vit_is_verified_by_an_installed_frameworks_network(
    target: str,
    installed: bool,
    vit_source: Path,
    converted_vit: Converted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    """Where the framework is not installed, with this project's network."""
    used = use_framework(target, installed, monkeypatch)
    converted_vit(target)
    capsys.readouterr()
    convert_file(vit_source, converted_vit(target), "--to", target, "--verify")
    line = capsys.readouterr().out
    assert float(line.removeprefix("verified: features differ by ").split()[0]) <= 1e-5
    assert used in line
    assert ("is not installed" in line) == (not installed)
    assert ("without class token and final norm" in line) == (target == "detectron2")


def test_vit_whose_patches_do_not_divide_the_image_is_verified(tmp_path: Path, capsys: Captured) -> None:
    torch.save(vit_weights(1, patch_size=60), tmp_path / "in.pth")
    convert_file(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "timm", "--verify")
    output = capsys.readouterr().out
    assert "150 tensors of the vit_tiny_patch60_224, for timm\nverified: features differ by" in output


@pytest.mark.parametrize("key", ["color_order", "colour_order"])
def test_network_gets_the_input_that_its_provenance_asks_for(
    key: str,
    source: Path,
    converted: Converted,
    images: Path,
    tmp_path: Path,
    capsys: Captured,
    convert_expecting_usage_error: FailingConvert,
) -> None:
    """BGR of twice the pixel values, by the key's present name and by its name in files of before."""
    weights, provenance = read_back(converted("detectron2"), "detectron2")
    swap_channels(weights)
    weights["conv1.weight"] /= 2
    del provenance["color_order"]
    provenance |= {key: "BGR", "mean": [0.406, 0.456, 0.485], "std": [0.225 / 2, 0.224 / 2, 0.229 / 2]}
    write_again(tmp_path / "out.pkl", "detectron2", weights, provenance)
    convert_file(source, tmp_path / "out.pkl", "--verify", str(images / "00.jpg"))
    assert "verified" in capsys.readouterr().out
    write_again(tmp_path / "wrong.pkl", "detectron2", weights, provenance | {key: "RGB"})
    assert "differ" in convert_expecting_usage_error(source, tmp_path / "wrong.pkl", "--verify")


# --verify fails.


def swap_channels(weights: Weights) -> None:
    weights["conv1.weight"] = weights["conv1.weight"].flip(1).contiguous()


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: change(weights[name]).contiguous()})


FAULTS: dict[str, tuple[Callable[[Weights], object], tuple[str, ...]]] = {
    "swapped channels": (swap_channels, ("differ", "those of swapped color channels (RGB and BGR)")),
    "student": (lambda weights: weights.update(STUDENT), ("differ", "those of the student")),
    "statistics": (replace("layer3.0.downsample.1.running_var", torch.ones_like), ("differ",)),
    "bias off by 1e-4 of the largest feature": (replace("layer4.1.bn2.bias", lambda bias: bias + 0.04), ("differ",)),
    "not a number": (replace("layer4.1.conv2.weight", lambda weight: weight * torch.nan), ("differ", "nan")),
    "no effect on features": (replace("bn1.num_batches_tracked", lambda count: count + 1), ("num_batches_tracked",)),
    "missing": (lambda weights: weights.pop("layer2.0.bn1.bias"), ("layer2.0.bn1.bias", "missing")),
}


@pytest.mark.parametrize(
    ("target", "fault"), [("detectron2", fault) for fault in FAULTS] + [("timm", "student"), ("mmseg", "statistics")]
)
def test_fault_is_found(
    target: str,
    fault: str,
    source: Path,
    converted: Converted,
    tmp_path: Path,
    convert_expecting_usage_error: FailingConvert,
) -> None:
    weights, provenance = read_back(converted(target), target)
    change, words = FAULTS[fault]
    change(weights)
    out = tmp_path / f"faulty{SUFFIX[target]}"
    write_again(out, target, weights, provenance)
    line = convert_expecting_usage_error(source, out, "--to", target, "--verify")
    assert all(word in line for word in (str(out), *words))


@pytest.mark.parametrize("missing", ["IN", "OUT"])
def test_file_that_cannot_be_read_is_named_as_in_the_help(
    missing: str, source: Path, tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    empty, out = tmp_path / "empty.pth", tmp_path / "out.pth"
    empty.touch()
    argv = (empty, out) if missing == "IN" else (source, empty)
    assert f"{missing} {empty}: truncated or no checkpoint; " in convert_expecting_usage_error(*argv, "--verify")


@pytest.mark.parametrize("error", [UsageError("they differ"), KeyboardInterrupt()])
def test_new_file_that_was_not_verified_is_removed(
    error: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(convert, "verify", fail)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        convert_file(source, tmp_path / "out.pth", "--verify")
    assert not list(tmp_path.iterdir())


VIT_FAULTS: dict[str, tuple[str, Callable[[Weights], object], str]] = {
    "swapped channels": (
        "timm",
        replace("patch_embed.proj.weight", lambda weight: weight.flip(1)),
        "swapped color channels (RGB and BGR)",
    ),
    "bias": ("mmseg", replace("blocks.3.attn.qkv.bias", torch.zeros_like), "its features differ"),
    "no effect on features": (
        "detectron2",
        replace("pos_embed", lambda positions: torch.cat([positions[:, :1] + 1, positions[:, 1:]], dim=1)),
        "pos_embed differs",
    ),
    "missing": ("detectron2", lambda weights: weights.pop("blocks.3.norm1.bias"), "blocks.3.norm1.bias is missing"),
}


@pytest.mark.parametrize("fault", VIT_FAULTS)
def test_fault_of_a_vit_is_found(
    fault: str,
    vit_source: Path,
    converted_vit: Converted,
    tmp_path: Path,
    convert_expecting_usage_error: FailingConvert,
) -> None:
    target, change, reason = VIT_FAULTS[fault]
    weights, provenance = read_back(converted_vit(target), target)
    change(weights)
    out = tmp_path / f"faulty{SUFFIX[target]}"
    if target == "detectron2":
        model = {f"backbone.net.{name}": value.numpy() for name, value in weights.items()}
        out.write_bytes(pickle.dumps({"model": model, "__author__": "they", "provenance": provenance}))
    else:
        names = {row.timm: row.mmseg if target == "mmseg" else row.timm for row in vit_rows(192, 12, 32)}
        named = {names[name]: value for name, value in weights.items()}
        torch.save({"state_dict": named, "provenance": provenance}, out)
    assert reason in convert_expecting_usage_error(vit_source, out, "--to", target, "--verify")


def test_file_for_another_framework_or_of_another_encoder_is_not_verified(
    source: Path, converted: Converted, tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    assert "is made for timm, not for mmseg; use convert.py with --to timm" in convert_expecting_usage_error(
        source, converted("timm"), "--to", "mmseg", "--verify"
    )
    assert "those of the teacher" in convert_expecting_usage_error(
        source, converted("torchvision"), "--encoder", "student", "--verify"
    )
    torch.save(vit_weights(1), tmp_path / "vit.pth")
    line = convert_expecting_usage_error(source, tmp_path / "vit.pth", "--verify")
    assert "a vit_tiny_patch16_224, and" in line
    assert "is a resnet18" in line


def test_file_that_its_framework_does_not_load_is_refused(
    source: Path, tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    """With a classifier, which timm's strict loader refuses."""
    pytest.importorskip("timm")
    provenance = {"format": "timm", "source": "in.pth", "source_sha256": "", "encoder": "only"}
    torch.save({"state_dict": resnet18_weights(1), "provenance": provenance}, tmp_path / "out.pth")
    assert "timm cannot load it" in convert_expecting_usage_error(
        source, tmp_path / "out.pth", "--to", "timm", "--verify"
    )


@pytest.mark.parametrize("kind", ["missing", "text", "huge"])
def test_unreadable_image_is_refused_and_nothing_is_written(
    kind: str,
    source: Path,
    tmp_path: Path,
    convert_expecting_usage_error: FailingConvert,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = tmp_path / "image.png"
    if kind == "text":
        image.write_text("no image")
    elif kind == "huge":
        Image.new("RGB", (40, 40)).save(image)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert f"--verify {image}: cannot be read as an image" in convert_expecting_usage_error(
        source, tmp_path / "out.pth", "--verify", image
    )


# Calls that are refused.


def test_existing_output_is_replaced_only_on_request(
    source: Path, tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    out = tmp_path / "out.pth"
    out.write_text("precious")
    assert "already exists; use another path or --overwrite" in convert_expecting_usage_error(source, out)
    assert "no such file" in convert_expecting_usage_error(tmp_path / "missing.pth", out, "--overwrite")
    convert_file(source, out, "--overwrite")
    assert_equal(read_back(out, "torchvision")[0], TEACHER)
    assert "is a folder" in convert_expecting_usage_error(source, tmp_path, "--overwrite", "--to", "torchvision")
    assert f"the folder {tmp_path / 'none'} does not exist" in convert_expecting_usage_error(
        source, tmp_path / "none" / "out.pth"
    )


def test_source_is_never_replaced_by_its_own_conversion(
    source: Path, tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    shutil.copy(source, tmp_path / "current.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "current.pth")
    for out in ("current.pth", "link.pth"):
        assert "is IN itself" in convert_expecting_usage_error(tmp_path / "current.pth", tmp_path / out, "--overwrite")


@pytest.mark.parametrize(
    ("name", "target", "better"),
    [
        ("out.pth", "detectron2", "out.pkl"),
        ("out", "detectron2", "out.pkl"),
        ("out.pkl", "safetensors", "out.safetensors"),
        ("out.pkl", "mmseg", "out.pth"),
        ("out.safetensors", "timm", "out.pth"),
        ("out.onnx", "torchvision", "out.pth"),
    ],
)
def test_suffix_of_another_framework_is_refused(
    name: str, target: str, better: str, source: Path, tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    assert f"name it {better}" in convert_expecting_usage_error(source, tmp_path / name, "--to", target)


@pytest.mark.parametrize("name", ["out.onnx", "out", "out.pth.tar"])
def test_unknown_suffix_is_refused(
    name: str, source: Path, tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    line = convert_expecting_usage_error(source, tmp_path / name)
    assert f"OUT {tmp_path / name}: unknown suffix; use one of .pth .pt .pkl .safetensors" in line


def test_framework_without_vits_is_refused_for_a_vit(
    tmp_path: Path, convert_expecting_usage_error: FailingConvert
) -> None:
    torch.save(vit_weights(1), tmp_path / "in.pth")
    line = convert_expecting_usage_error(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "torchvision")
    assert "torchvision has no vit_tiny_patch16_224" in line
    assert "use transfer/convert.py --to timm, detectron2, mmseg or safetensors" in line


def test_full_disk_leaves_the_old_file(
    source: Path, tmp_path: Path, convert_expecting_usage_error: FailingConvert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    (tmp_path / "out.pkl").write_text("precious")
    line = convert_expecting_usage_error(source, tmp_path / "out.pkl", "--overwrite")
    assert f"{tmp_path / 'out.pkl'}: cannot be written (No space left on device)" in line
    assert (tmp_path / "out.pkl").read_text() == "precious"


# The entry points for one framework.


@pytest.mark.parametrize(
    ("script", "target"),
    [("detection/convert_pretrain_to_d2.py", "detectron2"), ("segmentation/convert_pretrain_to_mm.py", "mmseg")],
)
def test_entry_point_writes_for_its_framework(
    script: str, target: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out{SUFFIX[target]}"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [script, str(source), str(out), "--encoder", "student"])
    runpy.run_path(str(ROOT / "transfer" / script), run_name="__main__")
    weights, provenance = read_back(out, target)
    assert_equal(weights, STUDENT)
    assert (provenance["format"], provenance["encoder"]) == (target, "student")


def test_published_command_runs_from_any_folder(source: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "transfer/detection/convert_pretrain_to_d2.py"), str(source), "out.pkl"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert_equal(read_back(tmp_path / "out.pkl", "detectron2")[0], TEACHER)
    assert [path.name for path in tmp_path.iterdir()] == ["out.pkl"]
