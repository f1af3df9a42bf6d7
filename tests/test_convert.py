"""Encoders of all kinds of files, in the files of all frameworks: which, whole, unchanged, told from others, or not."""

import argparse
import builtins
import contextlib
import hashlib
import json
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

import main_pretrain
from models import build_method
from models.backbones import ARCHITECTURES
from tests.reference.framework_names import resnet_rows
from transfer import convert
from transfer.encoders import read_encoder, infer_arch
from transfer.formats import FORMATS, detectron2_name, read_detectron2, torchvision_name
from utils.checkpoint import initialize_from
from utils.errors import UsageError

Tiny = Callable[..., list[str]]
Weights = dict[str, Tensor]
Refused = Callable[..., str]

ROOT = Path(__file__).parents[1]
SUFFIX = {"torchvision": ".pth", "timm": ".pth", "detectron2": ".pkl", "mmseg": ".pth", "safetensors": ".safetensors"}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HEADS = ("fc.", "head.")


# What files there are


def lively(shapes: dict[str, torch.Size], seed: int) -> Weights:
    """Weights no two of which are alike, as a trained network has them: nothing is 0, 1 or without effect.

    All are numbers of half precision, so that a file in half precision, which is quicker to read, holds them unchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value = torch.randint(1, 60_000, (), generator=generator)
        elif len(shape) > 1:
            value *= (2 / shape[1:].numel()) ** 0.5
        else:
            value = 0.2 * value if name.endswith(("bias", "mean")) else 0.5 + value.abs() / 2
        weights[name] = value.half().float() if value.is_floating_point() else value
    return weights


def half(weights: Weights) -> Weights:
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


@cache
def resnet(arch: str, seed: int) -> Weights:
    """torchvision's state dict, with its classifier."""
    with torch.device("meta"):
        network = torchvision.models.get_model(arch)
    return lively({name: value.shape for name, value in network.state_dict().items()}, seed)


@cache
def vit(arch: str, seed: int) -> Weights:
    """timm's state dict, with its classifier."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model(arch)
    return lively({name: value.shape for name, value in network.state_dict().items()}, seed)


def encoder(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith(HEADS)}


WHOLE = resnet("resnet18", 1)
TEACHER, STUDENT = encoder(WHOLE), encoder(resnet("resnet18", 2))


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def released(teacher: Weights, student: Weights) -> dict[str, Any]:
    """A file as the authors released theirs: a Namespace, DDP's prefix, heads and the optimizer's state beside it."""
    heads = {"center": torch.zeros(1, 8), "projector_q.mlp.0.weight": torch.ones(4, 4), "fc.weight": torch.ones(2)}
    model = under("module.", heads | under("encoder_q.", student) | under("encoder_k.", teacher))
    args = argparse.Namespace(arch="resnet50", dataset="COCO", epochs=800, teacher_momentum=0.99)
    optimizer = {"state": {0: {"mu": torch.ones(3)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    return {"args": args, "model": model, "optimizer": optimizer, "scheduler": {}, "epoch": 800, "scaler": {}}


def convert_file(source: Path, out: Path, *flags: str) -> Path:
    convert.main([str(source), str(out), *flags])
    return out


# Reading a result without the project's own readers


def read_back(path: Path, target: str, depth: int = 18) -> tuple[Weights, dict[str, Any]]:
    """Weights by torchvision's or timm's names, and provenance."""
    if target == "detectron2":
        with path.open("rb") as file:
            state = pickle.load(file)
        ours = {row.detectron2: row.torchvision for row in resnet_rows(depth)}
        return {ours[name]: torch.from_numpy(value) for name, value in state["model"].items()}, state["provenance"]
    if target == "safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(  # noqa: SIM118
                file.metadata()["provenance"]
            )
    state = torch.load(path, weights_only=True)
    return state["state_dict"], state["provenance"]


def write_anew(path: Path, target: str, weights: Weights, provenance: dict[str, Any]) -> None:
    """The same file with other contents."""
    if target == "detectron2":
        theirs = {row.torchvision: row.detectron2 for row in resnet_rows(18)}
        model = {theirs[name]: value.numpy() for name, value in weights.items()}
        state = {"model": model, "__author__": "they", "matching_heuristics": True, "provenance": provenance}
        path.write_bytes(pickle.dumps(state))
    elif target == "safetensors":
        metadata = {"format": "pt", "provenance": json.dumps(provenance)}
        safetensors.torch.save_file({n: v.contiguous() for n, v in weights.items()}, path, metadata)
    else:
        torch.save({"state_dict": weights, "provenance": provenance}, path)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


# Fixtures


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> Iterator[None]:
    """Files of networks are large: none outlives its test."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of files that several tests read and none changes."""
    folder = tmp_path_factory.mktemp("shelf")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bare(shelf: Path) -> Path:
    """torchvision's resnet18, in half precision."""
    torch.save(half(WHOLE), shelf / "bare.pth")
    return shelf / "bare.pth"


@pytest.fixture(scope="module")
def pair(shelf: Path) -> Path:
    """A released file with a resnet18 as teacher and another as student, in half precision."""
    torch.save(released(half(TEACHER), half(STUDENT)), shelf / "pair.pth")
    return shelf / "pair.pth"


@pytest.fixture(scope="module")
def pair50(shelf: Path) -> Path:
    """A released file with a resnet50 as teacher and another as student."""
    torch.save(released(encoder(resnet("resnet50", 1)), encoder(resnet("resnet50", 2))), shelf / "pair50.pth")
    return shelf / "pair50.pth"


@pytest.fixture(scope="module")
def converted(pair: Path, shelf: Path) -> Callable[[str], Path]:
    """The teacher of `pair` in the file of a framework."""

    @cache
    def of(target: str) -> Path:
        return convert_file(pair, shelf / f"teacher_{target}{SUFFIX[target]}", "--to", target)

    return of


@pytest.fixture(scope="module")
def converted50(pair50: Path, shelf: Path) -> Callable[[str], Path]:
    """The teacher of `pair50` in the file of a framework."""

    @cache
    def of(target: str) -> Path:
        return convert_file(pair50, shelf / f"teacher50_{target}{SUFFIX[target]}", "--to", target)

    return of


@pytest.fixture
def photograph(photographs: Path) -> Path:
    return min((photographs / "val2017").glob("*.jpg"))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run; expect exit status 2, one line on stderr, and every file in `tmp_path` as it was; return the line."""

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}

    def command(*argv: object, target: str | None = None) -> str:
        before = files()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            convert.main([str(word) for word in argv], target)
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert said.err.count("\n") == 1, said.err
        assert "verified" not in said.out
        assert files() == before
        return said.err

    return command


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond a MiB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# detectron2's names


@pytest.mark.parametrize(("depth", "tensors"), [(18, 120), (50, 318), (101, 624)])
def test_the_reference_holds_each_tensor_of_torchvision_once(depth: int, tensors: int) -> None:
    rows = resnet_rows(depth)
    assert len(rows) == len({row.detectron2 for row in rows}) == tensors
    weights = encoder(resnet(f"resnet{depth}", 1))
    assert {row.torchvision: row.shape for row in rows} == {name: tuple(value.shape) for name, value in weights.items()}


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
@pytest.mark.parametrize("depth", [18, 50, 101])
def test_the_reference_is_the_network_that_detectron2_builds(depth: int, norm: str) -> None:
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    config = get_cfg()
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.BACKBONE.FREEZE_AT = 0
    config.MODEL.RESNETS.DEPTH = depth
    config.MODEL.RESNETS.NORM = norm
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    with torch.device("meta"):
        weights = build_backbone(config, ShapeSpec(channels=3)).bottom_up.state_dict()
    assert {row.detectron2: row.shape for row in resnet_rows(depth)} == {n: tuple(v.shape) for n, v in weights.items()}


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_tensor_has_detectron2s_name_for_it(depth: int) -> None:
    for row in resnet_rows(depth):
        assert detectron2_name(row.torchvision) == row.detectron2
        assert torchvision_name(row.detectron2) == row.torchvision


def test_all_120_of_a_resnet18_arrive_in_detectron2(bare: Path, tmp_path: Path) -> None:
    model = pickle.loads(convert_file(bare, tmp_path / "out.pkl").read_bytes())["model"]
    assert {name: value.shape for name, value in model.items()} == {
        row.detectron2: row.shape for row in resnet_rows(18)
    }
    for row in resnet_rows(18):
        assert np.array_equal(model[row.detectron2], TEACHER[row.torchvision].numpy()), row


def test_all_318_of_a_resnet50_arrive_in_detectron2(converted50: Callable[[str], Path]) -> None:
    model = pickle.loads(converted50("detectron2").read_bytes())["model"]
    rows, weights = resnet_rows(50), resnet("resnet50", 1)
    assert len(model) == len(rows) == 318
    for row in rows:
        assert isinstance(model[row.detectron2], np.ndarray)
        assert model[row.detectron2].shape == row.shape
        assert np.array_equal(model[row.detectron2], weights[row.torchvision].numpy()), row


def test_detectron2_finds_the_prefix_of_its_detector_by_itself(converted: Callable[[str], Path]) -> None:
    state = pickle.loads(converted("detectron2").read_bytes())
    assert state["matching_heuristics"] is True
    assert isinstance(state["__author__"], str)  # without it detectron2 takes the file for a list of arrays


def test_detectron2_loads_the_whole_encoder_below_its_feature_pyramid(converted50: Callable[[str], Path]) -> None:
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    config = get_cfg()
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    detector = nn.Module()
    detector.backbone = build_backbone(config, ShapeSpec(channels=3))
    DetectionCheckpointer(detector).load(str(converted50("detectron2")))
    found, weights = detector.backbone.bottom_up.state_dict(), resnet("resnet50", 1)
    for row in resnet_rows(50):
        assert torch.equal(found[row.detectron2], weights[row.torchvision]), row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_for_detectron2_are_distinct_and_lead_back(arch: str) -> None:
    with torch.device("meta"):
        names = [name for name in torchvision.models.get_model(arch).state_dict() if not name.startswith("fc.")]
    theirs = [detectron2_name(name) for name in names]
    assert [torchvision_name(name) for name in theirs] == names
    assert len(set(theirs)) == len(names)


# Which encoder


def test_all_318_of_the_student_if_asked(pair50: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert_file(pair50, tmp_path / "out.pth", "--encoder", "student")
    found, provenance = read_back(out, "torchvision")
    assert len(found) == 318
    assert_equal(found, encoder(resnet("resnet50", 2)))
    assert (provenance["encoder"], provenance["arch"]) == ("student", "resnet50")
    line = capsys.readouterr().out
    for word in (str(out), "318", "student", "resnet50", "epoch 800", "torchvision"):
        assert word in line


def old(weights: Weights) -> Weights:
    """As files of before torch 0.4 are: without the counters of the batch norms."""
    return OrderedDict((name, value) for name, value in weights.items() if "num_batches" not in name)


def zeroed(weights: Weights) -> Weights:
    return {name: value * 0 if "num_batches" in name else value for name, value in weights.items()}


BF16 = {n: v.bfloat16().float() if v.is_floating_point() else v for n, v in TEACHER.items()}
NOISE = {"neck.weight": torch.ones(2), "bn9.running_mean": torch.ones(2), "encoderx.weight": torch.ones(2)}
FILES: dict[str, tuple[Callable[[], Any], str, Weights]] = {
    "both": (lambda: under("encoder_q.", STUDENT) | under("encoder_k.", TEACHER) | NOISE, "teacher", TEACHER),
    "both, the teacher first": (
        lambda: under("encoder_k.", TEACHER) | under("encoder_q.", STUDENT),
        "teacher",
        TEACHER,
    ),
    "the student alone": (lambda: {"model": under("encoder_q.", STUDENT)}, "student", STUDENT),
    "GTSA's names": (
        lambda: {"state_dict": under("module.base_encoder.", STUDENT) | under("module.momentum_encoder.", WHOLE)},
        "teacher",
        TEACHER,
    ),
    "GTSA's student alone": (lambda: {"model": under("base_encoder.", STUDENT)}, "student", STUDENT),
    "encoder.": (lambda: {"state_dict": under("encoder.", WHOLE)}, "only", TEACHER),
    "backbone.": (lambda: under("backbone.", TEACHER) | {"decode_head.weight": torch.ones(2)}, "only", TEACHER),
    "DDP's backbone.": (lambda: {"state_dict": under("module.backbone.", TEACHER)}, "only", TEACHER),
    "torchvision's": (lambda: WHOLE, "only", TEACHER),
    "bare, in a model": (lambda: {"model": TEACHER, "epoch": 3}, "only", TEACHER),
    "before torch 0.4": (lambda: old(WHOLE), "only", zeroed(TEACHER)),
    "both before torch 0.4": (
        lambda: {"model": under("module.encoder_k.", old(TEACHER)) | under("module.encoder_q.", old(STUDENT))},
        "teacher",
        zeroed(TEACHER),
    ),
    "bf16": (lambda: {n: v.bfloat16() if v.is_floating_point() else v for n, v in WHOLE.items()}, "only", BF16),
    "float32 and fp16": (lambda: half(WHOLE) | {"conv1.weight": WHOLE["conv1.weight"]}, "only", TEACHER),
    "parameters": (lambda: {n: nn.Parameter(v) if v.ndim else v for n, v in WHOLE.items()}, "only", TEACHER),
}


@pytest.mark.parametrize("file", FILES)
def test_the_encoder_is_found_in_files_of_all_kinds(file: str, tmp_path: Path) -> None:
    make, which, expected = FILES[file]
    torch.save(make(), tmp_path / "in.pth")
    found = read_encoder(tmp_path / "in.pth")
    assert_equal(found.weights, expected)
    assert (found.arch, found.provenance["encoder"]) == ("resnet18", which)
    assert {value.dtype for value in found.weights.values()} == {torch.float32, torch.int64}


def test_the_student_is_found_in_either_spelling(tmp_path: Path) -> None:
    for number, (q, k) in enumerate([("encoder_q.", "encoder_k."), ("base_encoder.", "momentum_encoder.")]):
        torch.save(under(k, TEACHER) | under(q, STUDENT), tmp_path / f"{number}.pth")
        assert_equal(read_encoder(tmp_path / f"{number}.pth", "student").weights, STUDENT)
        assert_equal(read_encoder(tmp_path / f"{number}.pth", "teacher").weights, TEACHER)


def test_a_file_of_torchs_old_layout_is_read(tmp_path: Path) -> None:
    """torchvision's older downloads are such files."""
    torch.save(old(WHOLE), tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    assert_equal(read_encoder(tmp_path / "in.pth").weights, zeroed(TEACHER))


def test_a_file_in_half_precision_throughout_still_loads(tmp_path: Path) -> None:
    """With its counters in half precision too, as `value.half()` over a whole state dict makes them."""
    torch.save({name: value.half() for name, value in WHOLE.items()}, tmp_path / "in.pth")
    found, _ = read_back(convert_file(tmp_path / "in.pth", tmp_path / "out.pth"), "torchvision")
    torchvision.models.resnet18().load_state_dict(found, strict=False)
    assert found["conv1.weight"].dtype == torch.float32
    assert torch.equal(found["conv1.weight"], TEACHER["conv1.weight"])


def test_counters_that_share_one_tensor_are_no_obstacle(tmp_path: Path) -> None:
    one = torch.tensor(5)
    shared = {name: one if "num_batches" in name else value for name, value in TEACHER.items()}
    torch.save(shared, tmp_path / "in.pth")
    for target in FORMATS:
        out = convert_file(tmp_path / "in.pth", tmp_path / f"{target}{SUFFIX[target]}", "--to", target)
        assert_equal(read_back(out, target)[0], shared)


def test_a_slice_of_a_larger_tensor_does_not_drag_the_rest_along(tmp_path: Path) -> None:
    flat = torch.zeros(WHOLE["layer4.0.conv1.weight"].numel() + 4_000_000)
    view = flat[: WHOLE["layer4.0.conv1.weight"].numel()].view(512, 256, 3, 3)
    view.copy_(WHOLE["layer4.0.conv1.weight"])
    torch.save(WHOLE | {"layer4.0.conv1.weight": view}, tmp_path / "in.pth")
    out = convert_file(tmp_path / "in.pth", tmp_path / "out.pth")
    assert out.stat().st_size < sum(value.nbytes for value in TEACHER.values()) + 2**20


def test_a_run_of_this_project_gives_its_teacher_and_its_student(tiny: Tiny, tmp_path: Path) -> None:
    main_pretrain.main(tiny("--teacher-momentum", "0.5"))
    current = tmp_path / "run" / "current.pth"
    model = torch.load(current, weights_only=True)["model"]
    for flags, part in (((), "encoder_k."), (("--encoder", "student"), "encoder_q.")):
        out = convert_file(current, tmp_path / f"{part}safetensors", *flags, "--verify")
        found, provenance = read_back(out, "safetensors")
        assert_equal(found, {n.removeprefix(part): v for n, v in model.items() if n.startswith(part)})
        assert (provenance["method"], provenance["epoch"]) == ("slotcon", 2)
        assert provenance["encoder"] == ("student" if flags else "teacher")
    assert not torch.equal(model["encoder_k.conv1.weight"], model["encoder_q.conv1.weight"])


@pytest.mark.parametrize("container", ["model", "state_dict"])
def test_the_teacher_of_gtsa_is_found_under_timms_names(container: str, tmp_path: Path) -> None:
    arch = "vit_tiny_patch16_224"
    teacher, student = vit(arch, 1), vit(arch, 2)
    state = under("momentum_encoder.", teacher) | under("base_encoder.", student)
    state |= {"base_projector.0.weight": torch.ones(3), "rot_predictor.0.weight": torch.ones(3)}
    torch.save({container: under("module.", state), "epoch": 100}, tmp_path / "in.pth")
    for flags, weights in (((), teacher), (("--encoder", "student"), student)):
        out = convert_file(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "timm", "--overwrite", *flags)
        found, provenance = read_back(out, "timm")
        assert_equal(found, encoder(weights))
        assert (provenance["arch"], provenance["epoch"]) == (arch, 100)


@pytest.mark.parametrize(
    ("arch", "suffix"),
    [
        ("resnet18", ".pth"),
        ("resnet50", ".safetensors"),
        ("vit_tiny_patch16_224", ".pth"),
        ("vit_small_patch16_224", ".safetensors"),
    ],
)
def test_timms_own_files_are_read(arch: str, suffix: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model(arch)
    weights = lively({name: value.shape for name, value in network.state_dict().items()}, 4)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"arch": arch, "epoch": 7, "state_dict": weights}, path)
    else:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    found = read_encoder(path)
    assert any(name.startswith(HEADS) for name in weights)
    assert_equal(found.weights, encoder(weights))
    assert (found.arch, found.provenance["encoder"]) == (arch, "only")


@pytest.mark.parametrize("arch", ["resnet34", "wide_resnet50_2", "resnext50_32x4d", "resnext101_64x4d"])
def test_an_architecture_is_known_by_its_shapes(arch: str) -> None:
    with torch.device("meta"):
        weights = encoder(torchvision.models.get_model(arch).state_dict())
    assert infer_arch(weights, "file") == arch


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_a_vit_gets_a_name_that_timm_builds_its_shapes_from_or_none(size: str, patch: int) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        weights = encoder(timm.create_model(f"vit_{size}_patch16_224", patch_size=patch).state_dict())
        try:
            arch = infer_arch(weights, "file")
        except UsageError:
            assert not timm.is_model(f"vit_{size}_patch{patch}_224")
            return
        assert timm.is_model(arch), f"timm has no {arch}"
        theirs = timm.create_model(arch, num_classes=0).state_dict()
    assert {n: v.shape for n, v in theirs.items()} == {n: v.shape for n, v in weights.items()}


# Every format


@pytest.mark.parametrize("target", FORMATS)
def test_a_resnet50_comes_out_of_every_format_whole_and_says_where_it_comes_from(
    target: str, pair50: Path, converted50: Callable[[str], Path]
) -> None:
    found, provenance = read_back(converted50(target), target, 50)
    assert_equal(found, encoder(resnet("resnet50", 1)))
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    assert provenance == {
        "epoch": 800,
        "source": "pair50.pth",
        "source_sha256": hashlib.sha256(pair50.read_bytes()).hexdigest(),
        "color_order": "RGB",
        "mean": MEAN,
        "std": STD,
        "encoder": "teacher",
        "arch": "resnet50",
        "format": target,
    }


def test_method_and_epoch_are_told_where_the_file_tells_them(tmp_path: Path) -> None:
    for args in (argparse.Namespace(method="slotfa"), {"method": "slotfa"}):
        torch.save({"args": args, "epoch": 12, "model": under("encoder_k.", TEACHER)}, tmp_path / "in.pth")
        provenance = read_encoder(tmp_path / "in.pth").provenance
        assert (provenance["method"], provenance["epoch"]) == ("slotfa", 12)
    torch.save(TEACHER, tmp_path / "in.pth")
    assert not {"method", "epoch"} & read_encoder(tmp_path / "in.pth").provenance.keys()


def test_torchvision_loads_it(converted: Callable[[str], Path]) -> None:
    network = torchvision.models.resnet18(num_classes=3)
    misfits = network.load_state_dict(
        torch.load(converted("torchvision"), weights_only=True)["state_dict"], strict=False
    )
    assert set(misfits.missing_keys) == {"fc.weight", "fc.bias"}
    assert not misfits.unexpected_keys
    assert_equal(encoder(network.state_dict()), TEACHER)


@pytest.mark.parametrize("target", ["timm", "torchvision", "safetensors"])
def test_timm_loads_it(target: str, converted: Callable[[str], Path]) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(converted(target)))
    assert_equal(network.state_dict(), TEACHER)


@pytest.mark.parametrize("target", ["timm", "safetensors"])
def test_timm_loads_a_vit(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm")
    weights = vit("vit_tiny_patch16_224", 1)
    torch.save(weights, tmp_path / "in.pth")
    out = convert_file(tmp_path / "in.pth", tmp_path / f"out{SUFFIX[target]}", "--to", target, "--verify")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(out))
    assert_equal(network.state_dict(), encoder(weights))
    assert "verified" in capsys.readouterr().out


def test_mmseg_loads_it(converted50: Callable[[str], Path]) -> None:
    mmseg_models = pytest.importorskip("mmseg.models")
    from mmengine.runner.checkpoint import load_checkpoint

    network = mmseg_models.ResNet(depth=50)
    load_checkpoint(network, str(converted50("mmseg")), map_location="cpu", strict=True)
    assert_equal(network.state_dict(), encoder(resnet("resnet50", 1)))


def test_the_suffix_says_the_framework_where_nothing_else_does(bare: Path, tmp_path: Path) -> None:
    for suffix, target in ((".pkl", "detectron2"), (".safetensors", "safetensors"), (".pth", "torchvision")):
        _, provenance = read_back(convert_file(bare, tmp_path / f"out{suffix}"), target)
        assert provenance["format"] == target
        assert "method" not in provenance


def test_any_protocol_of_pickle_is_read_as_detectron2s_own_files_have_several(tmp_path: Path) -> None:
    model = {"stem.conv1.weight": np.ones((2, 3), np.float32), "stem.conv1.norm.num_batches_tracked": np.array(3)}
    for protocol in range(5):
        (tmp_path / "in.pkl").write_bytes(pickle.dumps({"model": OrderedDict(model), "__author__": "they"}, protocol))
        found = read_detectron2(tmp_path / "in.pkl")["model"]
        assert all(np.array_equal(found[name], model[name]) for name in model)


# --verify: what it lets pass


@pytest.mark.parametrize("target", FORMATS)
def test_a_whole_conversion_is_verified(
    target: str, pair: Path, converted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = converted(target)
    before = out.stat().st_mtime_ns
    capsys.readouterr()
    convert_file(pair, out, "--to", target, "--verify")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("verified")
    assert float(line.split("differ by ")[1].split()[0]) <= 1e-5
    assert out.stat().st_mtime_ns == before


def test_verifying_is_part_of_converting(
    pair50: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a photograph, with a resnet50 and the student."""
    flags = ["--encoder", "student", "--verify", str(photograph)]
    out = convert_file(pair50, tmp_path / "out.pkl", *flags)
    assert "verified" in capsys.readouterr().out
    assert_equal(read_back(out, "detectron2", 50)[0], encoder(resnet("resnet50", 2)))


@pytest.mark.parametrize("target", ["timm", "mmseg", "detectron2"])
def test_a_framework_that_is_there_is_the_judge(
    target: str, pair: Path, converted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(target)
    convert_file(pair, converted(target), "--to", target, "--verify")
    assert f"{target}'s network" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["timm", "mmseg", "detectron2"])
def test_a_framework_that_is_not_there_is_not_needed(
    target: str,
    pair: Path,
    converted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == target]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, target, None)
    convert_file(pair, converted(target), "--to", target, "--verify")
    assert f"{target} is not installed" in capsys.readouterr().out


def test_a_vit_without_timm_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    torch.save(vit("vit_tiny_patch16_224", 1), tmp_path / "in.pth")
    out = convert_file(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "timm")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm" in refused(tmp_path / "in.pth", out, "--to", "timm", "--verify")


def test_other_peoples_files_without_provenance_are_verified(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": under("backbone.", TEACHER)}, tmp_path / "theirs.pth")
    convert_file(bare, tmp_path / "theirs.pth", "--verify")
    assert "verified" in capsys.readouterr().out


def test_a_file_that_says_that_it_wants_bgr_is_fed_bgr(
    pair: Path, converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, provenance = read_back(converted("detectron2"), "detectron2")
    bgr = {"color_order": "BGR", "mean": MEAN[::-1], "std": STD[::-1]}
    weights["conv1.weight"] = weights["conv1.weight"].flip(1).contiguous()
    write_anew(tmp_path / "bgr.pkl", "detectron2", weights, provenance | bgr)
    convert_file(pair, tmp_path / "bgr.pkl", "--verify")
    assert "verified" in capsys.readouterr().out


def test_normalization_within_the_network_is_taken_into_account(
    pair: Path, converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that wants twice the levels, with half the weights, computes the same."""
    weights, provenance = read_back(converted("torchvision"), "torchvision")
    weights["conv1.weight"] /= 2
    scaled = {"std": [level / 2 for level in STD]}
    write_anew(tmp_path / "scaled.pth", "torchvision", weights, provenance | scaled)
    convert_file(pair, tmp_path / "scaled.pth", "--verify")
    assert "verified" in capsys.readouterr().out


# --verify: what it catches


def swap_channels(weights: Weights) -> None:
    weights["conv1.weight"] = weights["conv1.weight"].flip(1).contiguous()


def take_the_student(weights: Weights) -> None:
    weights.update(STUDENT)


def zero_a_bias(weights: Weights) -> None:
    weights["layer4.1.bn1.bias"] = torch.zeros(512)


def drop_a_bias(weights: Weights) -> None:
    del weights["layer2.0.bn1.bias"]


def swap_layers(weights: Weights) -> None:
    one, other = "layer1.0.conv1.weight", "layer1.1.conv1.weight"
    weights[one], weights[other] = weights[other], weights[one]


def reset_a_variance(weights: Weights) -> None:
    weights["layer3.0.downsample.1.running_var"] = torch.ones(256)


def reset_a_mean(weights: Weights) -> None:
    weights["layer1.0.bn2.running_mean"] = torch.zeros(64)


def nudge_a_bias(weights: Weights) -> None:
    """By some 1e-4 of the largest feature."""
    weights["layer4.1.bn2.bias"] = weights["layer4.1.bn2.bias"] + 0.04


def break_a_weight(weights: Weights) -> None:
    weights["layer4.1.conv2.weight"] = weights["layer4.1.conv2.weight"] * torch.nan


def lose_a_shape(weights: Weights) -> None:
    weights["conv1.weight"] = weights["conv1.weight"][:, :1].contiguous()


FAULTS: dict[Callable[[Weights], None], tuple[str, ...]] = {
    swap_channels: ("differ", "channels", "RGB"),
    take_the_student: ("differ", "those of the student"),
    zero_a_bias: ("differ",),
    drop_a_bias: ("layer2.0.bn1.bias", "missing"),
    swap_layers: ("differ",),
    reset_a_variance: ("differ",),
    reset_a_mean: ("differ",),
    nudge_a_bias: ("differ",),
    break_a_weight: ("differ", "nan"),
    lose_a_shape: ("conv1.weight", "(64, 1, 7, 7)", "(64, 3, 7, 7)"),
}


@pytest.mark.parametrize(
    ("target", "fault"),
    [("detectron2", fault) for fault in FAULTS]
    + [(target, swap_channels) for target in SUFFIX if target != "detectron2"],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_fault_is_caught_and_said(
    target: str,
    fault: Callable[[Weights], None],
    pair: Path,
    converted: Callable[[str], Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    weights, provenance = read_back(converted(target), target)
    weights = dict(weights)
    fault(weights)
    out = tmp_path / f"faulty{SUFFIX[target]}"
    write_anew(out, target, weights, provenance)
    line = refused(pair, out, "--to", target, "--verify")
    assert str(out) in line
    for word in FAULTS[fault]:
        assert word in line


@pytest.mark.parametrize("target", ["timm", "mmseg"])
def test_a_result_that_its_framework_does_not_load_is_told(
    target: str, bare: Path, tmp_path: Path, refused: Refused
) -> None:
    """A classifier too many, which their strict loaders refuse."""
    pytest.importorskip(target)
    provenance = {"format": target, "source": "in.pth", "source_sha256": "", "encoder": "only"}
    torch.save({"state_dict": WHOLE, "provenance": provenance}, tmp_path / "out.pth")
    assert "fc.weight" in refused(bare, tmp_path / "out.pth", "--to", target, "--verify")


def test_the_teacher_in_place_of_the_student_is_said(
    pair: Path, converted: Callable[[str], Path], refused: Refused
) -> None:
    assert "those of the teacher" in refused(pair, converted("torchvision"), "--encoder", "student", "--verify")


def test_another_source_is_caught(
    bare: Path, converted50: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    torch.save(STUDENT, tmp_path / "other.pth")
    assert "differ" in refused(bare, tmp_path / "other.pth", "--verify")
    line = refused(bare, converted50("torchvision"), "--verify")
    assert "resnet50" in line
    assert "resnet18" in line


@pytest.mark.parametrize("said", [{"color_order": "BGR"}, {"std": [0.25, 0.25, 0.25]}])
def test_a_wrong_word_about_its_input_is_caught(
    said: dict[str, Any], pair: Path, converted: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    weights, provenance = read_back(converted("detectron2"), "detectron2")
    write_anew(tmp_path / "out.pkl", "detectron2", weights, provenance | said)
    assert "differ" in refused(pair, tmp_path / "out.pkl", "--verify")


@pytest.mark.parametrize("fault", [swap_channels, zero_a_bias])
def test_a_fault_is_caught_on_a_photograph(
    fault: Callable[[Weights], None],
    pair: Path,
    converted: Callable[[str], Path],
    photograph: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    weights, provenance = read_back(converted("detectron2"), "detectron2")
    fault(weights)
    write_anew(tmp_path / "out.pkl", "detectron2", weights, provenance)
    line = refused(pair, tmp_path / "out.pkl", "--verify", photograph)
    assert all(word in line for word in FAULTS[fault])


def test_swapped_channels_of_a_vit_are_said(tmp_path: Path, refused: Refused) -> None:
    weights = vit("vit_tiny_patch16_224", 1)
    torch.save(weights, tmp_path / "in.pth")
    swapped = encoder(weights) | {"patch_embed.proj.weight": weights["patch_embed.proj.weight"].flip(1)}
    torch.save({"state_dict": swapped, "provenance": {"format": "timm"}}, tmp_path / "out.pth")
    assert "channels" in refused(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "timm", "--verify")


@pytest.mark.parametrize("kind", ["absent", "folder", "text", "truncated", "huge"])
def test_an_unreadable_image_is_told_and_nothing_is_written(
    kind: str, bare: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / f"{kind}.png"
    if kind == "folder":
        image.mkdir()
    elif kind == "text":
        image.write_text("no image")
    elif kind != "absent":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(image)
    if kind == "truncated":
        image.write_bytes(image.read_bytes()[:2000])
    if kind == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert image.name in refused(bare, tmp_path / "out.pth", "--verify", image)


def test_the_image_that_is_given_is_the_one_that_is_looked_at(
    bare: Path, converted: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    line = refused(bare, converted("torchvision"), "--verify", tmp_path / "text.jpg")
    assert "text.jpg" in line
    assert "image" in line


# Mistakes


def refuse_file(refused: Refused, path: Path, *flags: str) -> str:
    """The line about a bad IN, which leaves no OUT, and an OUT that is there as it is."""
    out = path.parent / "out.pth"
    line = refused(path, out, *flags)
    assert not out.exists()
    out.write_text("precious")
    assert refused(path, out, "--overwrite", *flags) == line
    assert out.read_text() == "precious"
    assert path.name in line
    return line


def test_a_missing_file_is_named(tmp_path: Path, refused: Refused) -> None:
    assert "no such file" in refuse_file(refused, tmp_path / "nowhere.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_a_folder_is_no_checkpoint(suffix: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    refuse_file(refused, tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_an_empty_file_is_no_checkpoint(suffix: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / f"empty{suffix}").touch()
    refuse_file(refused, tmp_path / f"empty{suffix}")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"model": {"projector.weight": torch.ones(2)}}, "no encoder"),
        ({"model": {"encoder_k.fc.weight": torch.ones(2)}}, "no encoder"),
        ({"epoch": 3}, "no weights"),
        ({}, "no weights"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({0: torch.ones(2), 1: torch.ones(3)}, ""),
    ],
)
def test_a_file_without_an_encoder_is_told(state: Any, said: str, tmp_path: Path, refused: Refused) -> None:
    torch.save(state, tmp_path / "in.pth")
    assert said in refuse_file(refused, tmp_path / "in.pth")


@pytest.mark.parametrize("name", ["conv1.weight", "layer4.1.bn2.running_var", "layer2.0.downsample.0.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path, refused: Refused) -> None:
    """In a released file; without `conv1.weight` its prefix alone tells that there is an encoder."""
    weights = under("module.encoder_k.", half(TEACHER))
    del weights[f"module.encoder_k.{name}"]
    torch.save({"model": weights}, tmp_path / "in.pth")
    line = refuse_file(refused, tmp_path / "in.pth")
    assert name in line
    assert "resnet18" in line


def test_a_missing_tensor_of_a_vit_is_named(tmp_path: Path, refused: Refused) -> None:
    for name in ("blocks.3.attn.qkv.bias", "cls_token", "norm.weight"):
        weights = dict(vit("vit_tiny_patch16_224", 1))
        del weights[name]
        torch.save(weights, tmp_path / "in.pth")
        line = refused(tmp_path / "in.pth", tmp_path / "out.pth", "--to", "timm")
        assert name in line
        assert "vit_tiny_patch16_224" in line


def test_a_tensor_of_another_shape_is_named(tmp_path: Path, refused: Refused) -> None:
    torch.save(half(TEACHER) | {"conv1.weight": torch.ones(64, 4, 7, 7)}, tmp_path / "in.pth")
    line = refuse_file(refused, tmp_path / "in.pth")
    assert "conv1.weight" in line
    assert "(64, 4, 7, 7)" in line
    assert "(64, 3, 7, 7)" in line


def test_a_tensor_too_many_is_named(tmp_path: Path, refused: Refused) -> None:
    torch.save(half(TEACHER) | {"neck.weight": torch.ones(2)}, tmp_path / "in.pth")
    line = refuse_file(refused, tmp_path / "in.pth")
    assert "neck.weight" in line
    assert "resnet18" in line


def test_another_architecture_is_told(tmp_path: Path, refused: Refused) -> None:
    block = torchvision.models.resnet.BasicBlock
    with torch.device("meta"):
        shallow = torchvision.models.ResNet(block, [1, 1, 1, 1]).state_dict()
        deep = torchvision.models.ResNet(block, [2, 2, 2, 5]).state_dict()
        vgg = torchvision.models.vgg11().state_dict()
    for number, state in enumerate([shallow, deep]):
        torch.save({n: torch.ones(v.shape, dtype=v.dtype) for n, v in state.items()}, tmp_path / f"{number}.pth")
        line = refused(tmp_path / f"{number}.pth", tmp_path / "out.pth")
        assert "closest" in line
        assert "layer" in line
    torch.save({n: torch.ones(()) for n in vgg}, tmp_path / "vgg.pth")
    assert "no encoder" in refused(tmp_path / "vgg.pth", tmp_path / "out.pth")


@pytest.mark.parametrize("target", FORMATS)
def test_a_converted_file_is_not_converted_again(
    target: str, converted: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    line = refused(converted(target), tmp_path / "out.pth")
    assert "already converted" in line
    assert target in line
    assert str(converted(target)) in line
    if target != "detectron2":
        assert "pair.pth" in line


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.99999])
@pytest.mark.parametrize("kind", ["released", "old", "safetensors"])
def test_a_truncated_file_is_refused(kind: str, share: float, pair: Path, tmp_path: Path, refused: Refused) -> None:
    short = tmp_path / f"short.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "released":
        shutil.copy(pair, short)
    elif kind == "old":
        torch.save(half(old(WHOLE)), short, _use_new_zipfile_serialization=False)
    else:
        safetensors.torch.save_file(half(TEACHER), short)
    os.truncate(short, int(short.stat().st_size * share))
    assert short.name in refused(short, tmp_path / "out.pth")


@pytest.mark.parametrize("target", ["torchvision", "detectron2", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.0001, 0.99999])
def test_a_truncated_result_is_not_verified(
    target: str, share: float, bare: Path, converted: Callable[[str], Path], tmp_path: Path, refused: Refused
) -> None:
    short = tmp_path / f"short{SUFFIX[target]}"
    shutil.copy(converted(target), short)
    os.truncate(short, int(short.stat().st_size * share))
    assert short.name in refused(bare, short, "--to", target, "--verify")


class Trap:
    """Makes a folder when it is unpickled as pickle would."""

    def __init__(self, function: Callable[..., object], *words: str):
        self.call = function, words

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return self.call


TRAPS = [
    Trap(os.mkdir, "sprung"),
    Trap(builtins.eval, "__import__('os').mkdir('sprung')"),
    Trap(np.savetxt, "sprung", "1"),
]


@pytest.mark.parametrize("trap", TRAPS, ids=["mkdir", "eval", "numpy"])
@pytest.mark.parametrize("protocol", [0, 4])
def test_code_in_a_pickle_never_runs(
    protocol: int, trap: Trap, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = {"model": {"stem.conv1.weight": np.ones(2), "conv1.weight": trap}, "x": trap}
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(plain, protocol))
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(plain, protocol))
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"model": trap}, protocol))
    torch.save({"model": {"conv1.weight": torch.ones(2)}, "args": trap}, tmp_path / "torch.pth", pickle_protocol=2)
    for name in ("raw.pkl", "raw.pth", "other.pkl", "torch.pth"):
        assert name in refused(name, "out.pth")
    for name in ("raw.pkl", "raw.pth"):
        assert name in refused(bare, name, "--verify")
    for name in ("raw.pkl", "other.pkl"):
        with pytest.raises(UsageError, match=name):
            read_detectron2(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path, refused: Refused) -> None:
    broken = TEACHER["layer3.0.bn1.weight"].clone()
    broken[7] = value
    weights = under("encoder_k.", half(TEACHER) | {"layer3.0.bn1.weight": broken})
    weights |= under("encoder_q.", half(STUDENT))
    torch.save({"model": weights}, tmp_path / "in.pth")
    line = refuse_file(refused, tmp_path / "in.pth")
    assert "layer3.0.bn1.weight" in line
    assert "finite" in line
    convert_file(tmp_path / "in.pth", tmp_path / "student.pth", "--encoder", "student")


@pytest.mark.parametrize("carried", ["made by hand", ["a"], {"format": "theirs"}, 3])
def test_somebody_elses_word_of_provenance_does_no_harm(carried: Any, tmp_path: Path) -> None:
    """Converted, or refused in one line."""
    torch.save({"state_dict": half(TEACHER), "provenance": carried}, tmp_path / "in.pth")
    with contextlib.suppress(SystemExit):
        convert_file(tmp_path / "in.pth", tmp_path / "out.pth")


def test_a_folder_that_is_not_there_is_named(bare: Path, tmp_path: Path, refused: Refused) -> None:
    line = refused(bare, tmp_path / "nowhere" / "out.pth")
    assert str(tmp_path / "nowhere") in line
    line = refused(bare, bare / "out.pth")
    assert str(bare) in line


def test_a_folder_is_not_overwritten(bare: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "out.pth").mkdir()
    refused(bare, tmp_path / "out.pth")
    refused(bare, tmp_path / "out.pth", "--overwrite")


@pytest.mark.parametrize("target", FORMATS)
def test_a_full_disk_leaves_nothing_behind(
    target: str, bare: Path, tmp_path: Path, refused: Refused, full_disk: None
) -> None:
    out = tmp_path / f"out{SUFFIX[target]}"
    line = refused(bare, out, "--to", target)
    assert f"{out}: cannot be written" in line
    out.write_text("precious")
    refused(bare, out, "--to", target, "--overwrite")
    assert out.read_text() == "precious"


def test_a_result_is_replaced_only_when_asked_to(bare: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out.pth"
    out.write_text("precious")
    line = refused(bare, out)
    assert str(out) in line
    assert "--overwrite" in line
    convert_file(bare, out, "--overwrite")
    assert_equal(read_back(out, "torchvision")[0], TEACHER)


def test_the_source_is_never_replaced_by_its_own_conversion(pair: Path, tmp_path: Path) -> None:
    """It holds more than the encoder: the student, the heads, the state of the optimizer."""
    source = tmp_path / "current.pth"
    shutil.copy(pair, source)
    (tmp_path / "link.pth").symlink_to(source)
    for out in (source, tmp_path / "link.pth"):
        with pytest.raises(SystemExit) as stopped:
            convert.main([str(source), str(out), "--overwrite"])
        assert stopped.value.code == 2
        assert "model" in torch.load(source, weights_only=False)


@pytest.mark.parametrize(
    ("name", "target", "better"),
    [
        ("out.pth", "detectron2", "out.pkl"),
        ("out", "detectron2", "out.pkl"),
        ("out.pkl", "safetensors", "out.safetensors"),
        ("out.pkl", "torchvision", "out.pth"),
        ("out.pkl", "mmseg", "out.pth"),
        ("out.safetensors", "timm", "out.pth"),
    ],
)
def test_a_suffix_that_does_not_fit_is_told_with_one_that_does(
    name: str, target: str, better: str, bare: Path, tmp_path: Path, refused: Refused
) -> None:
    assert better in refused(bare, tmp_path / name, "--to", target)
    if target in ("detectron2", "mmseg"):
        assert better in refused(bare, tmp_path / name, target=target)


@pytest.mark.parametrize("target", ["torchvision", "detectron2", "mmseg"])
def test_a_vit_has_no_form_for_some_and_is_told_so(target: str, tmp_path: Path, refused: Refused) -> None:
    torch.save(vit("vit_tiny_patch16_224", 1), tmp_path / "in.pth")
    line = refused(tmp_path / "in.pth", tmp_path / f"out{SUFFIX[target]}", "--to", target)
    for word in ("vit_tiny_patch16_224", target, "timm", "safetensors"):
        assert word in line


def test_a_backbone_alone_is_neither_teacher_nor_student(bare: Path, tmp_path: Path, refused: Refused) -> None:
    for which in ("student", "teacher"):
        line = refused(bare, tmp_path / "out.pth", "--encoder", which)
        assert f"no {which}" in line
        assert "--encoder" in line


def test_an_encoder_that_is_not_there_is_told_with_the_one_that_is(tmp_path: Path, refused: Refused) -> None:
    torch.save({"model": under("encoder_k.", half(TEACHER))}, tmp_path / "in.pth")
    line = refused(tmp_path / "in.pth", tmp_path / "out.pth", "--encoder", "student")
    assert "no student" in line
    assert "teacher" in line


@pytest.mark.parametrize("flags", [("--to", "caffe"), ("--encoder", "both"), ("--color", "BGR"), ("more",)])
def test_a_wrong_flag_is_told(flags: tuple[str, ...], bare: Path, tmp_path: Path, refused: Refused) -> None:
    assert flags[0] in refused(bare, tmp_path / "out.pth", *flags)


# The commands


def command(script: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = (sys.executable, ROOT / script, *words)
    return subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_published_command_runs_from_any_folder(pair: Path, tmp_path: Path) -> None:
    shutil.copy(pair, tmp_path / "in.pth")
    done = command("transfer/detection/convert_pretrain_to_d2.py", "in.pth", "out.pkl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found, provenance = read_back(tmp_path / "out.pkl", "detectron2")
    assert_equal(found, TEACHER)
    assert provenance["format"] == "detectron2"
    assert {path.name for path in tmp_path.iterdir()} == {"in.pth", "out.pkl"}


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    script = "transfer/segmentation/convert_pretrain_to_mm.py"
    done = command(script, "nowhere.pth", "out.pth", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{Path(script).name}: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "target"),
    [("detection/convert_pretrain_to_d2.py", "detectron2"), ("segmentation/convert_pretrain_to_mm.py", "mmseg")],
)
def test_the_entries_write_for_their_framework_with_the_flags_of_all(
    script: str, target: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out{SUFFIX[target]}"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [script, str(pair), str(out), "--encoder", "student", "--verify"])
    runpy.run_path(str(ROOT / "transfer" / script), run_name="__main__")
    found, provenance = read_back(out, target)
    assert_equal(found, STUDENT)
    assert (provenance["format"], provenance["encoder"]) == (target, "student")


def test_an_entry_for_one_framework_does_not_take_another(bare: Path, tmp_path: Path, refused: Refused) -> None:
    assert "--to" in refused(bare, tmp_path / "out.pkl", "--to", "timm", target="detectron2")


def test_an_entry_for_one_framework_does_not_speak_of_a_flag_that_it_lacks(tmp_path: Path, refused: Refused) -> None:
    torch.save(vit("vit_tiny_patch16_224", 1), tmp_path / "in.pth")
    line = refused(tmp_path / "in.pth", tmp_path / "out.pkl", target="detectron2")
    assert "timm" in line
    assert "--to" not in line or "convert.py" in line


def test_the_help_names_every_framework(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert.main(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert all(word in told for word in (*FORMATS, "--verify", "--overwrite", "--encoder"))
    assert "None" not in told


# Starting a run from any of these


INITS: dict[str, tuple[Callable[[], Any], Weights, Weights]] = {
    "before torch 0.4": (lambda: old(WHOLE), zeroed(TEACHER), zeroed(TEACHER)),
    "GTSA's names": (
        lambda: {"model": under("module.base_encoder.", STUDENT) | under("module.momentum_encoder.", TEACHER)},
        STUDENT,
        TEACHER,
    ),
    "the teacher alone": (lambda: under("encoder_k.", TEACHER), TEACHER, TEACHER),
    "encoder.": (lambda: {"state_dict": under("encoder.", WHOLE)}, TEACHER, TEACHER),
}


@pytest.mark.parametrize("file", INITS)
def test_a_run_starts_from_files_of_all_kinds(file: str, tiny_args: argparse.Namespace, tmp_path: Path) -> None:
    make, student, teacher = INITS[file]
    torch.save(make(), tmp_path / "in.pth")
    method = build_method(tiny_args)
    assert {"encoder_q", "encoder_k"} <= set(initialize_from(method, tmp_path / "in.pth"))
    assert_equal(method.encoder_q.state_dict(), student)
    assert_equal(method.encoder_k.state_dict(), teacher)


def test_the_command_starts_a_run_from_a_safetensors_file(tiny: Tiny, tmp_path: Path) -> None:
    safetensors.torch.save_file(WHOLE, tmp_path / "in.safetensors")
    argv = tiny("--init", str(tmp_path / "in.safetensors"), "--base-lr", "0", "--epochs", "1", "--warmup-epoch", "0")
    main_pretrain.main([*argv, "--teacher-momentum", "1"])
    model = torch.load(tmp_path / "run" / "current.pth", weights_only=True)["model"]
    for name, value in TEACHER.items():
        for side in "qk" if name.endswith(("weight", "bias")) else ():
            torch.testing.assert_close(model[f"encoder_{side}.{name}"], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("target", ["mmseg", "safetensors"])
def test_a_run_starts_from_a_converted_encoder(
    target: str, converted: Callable[[str], Path], tiny_args: argparse.Namespace
) -> None:
    method = build_method(tiny_args)
    initialize_from(method, converted(target))
    assert_equal(method.encoder_q.state_dict(), TEACHER)
    assert_equal(method.encoder_k.state_dict(), TEACHER)
