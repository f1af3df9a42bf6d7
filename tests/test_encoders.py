"""Encoders of checkpoints: complete, identified by their shapes, and with their provenance."""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from models.backbones import ARCHITECTURES, VITS, build_encoder
from tests.checkpoint_data import (
    add_prefix,
    assert_equal,
    released_checkpoint,
    resnet18_weights,
    to_half,
    vit_weights,
    without_classifier,
)
from transfer.encoders import infer_arch, load_encoder, read_encoder, read_provenance
from utils.errors import UsageError

TEACHER, STUDENT = without_classifier(resnet18_weights(1)), without_classifier(resnet18_weights(2))


def test_released_checkpoint_gives_teacher_and_student_with_provenance(tmp_path: Path) -> None:
    path = tmp_path / "released.pth"
    torch.save(released_checkpoint(to_half(TEACHER), to_half(STUDENT)), path)
    encoder = read_encoder(path)
    assert_equal(encoder.weights, TEACHER)
    assert {value.dtype for value in encoder.weights.values()} == {torch.float32, torch.int64}
    assert encoder.provenance == {
        "epoch": 800,
        "source": "released.pth",
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "color_order": "RGB",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "encoder": "teacher",
        "arch": "resnet18",
    }
    assert_equal(read_encoder(path, "student").weights, STUDENT)


@pytest.mark.parametrize("args", [argparse.Namespace(method="slotfa"), {"method": "slotfa"}])
def test_provenance_names_the_method_where_the_checkpoint_does(args: Any, tmp_path: Path) -> None:
    torch.save({"args": args, "epoch": 12, "model": add_prefix("encoder_k.", TEACHER)}, tmp_path / "in.pth")
    provenance = read_encoder(tmp_path / "in.pth").provenance
    assert (provenance["method"], provenance["epoch"], provenance["encoder"]) == ("slotfa", 12, "teacher")


def test_files_of_other_layouts_and_precisions_are_read(tmp_path: Path) -> None:
    old = {name: value for name, value in resnet18_weights(1).items() if "num_batches" not in name}
    torch.save(old, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)  # as torchvision's older downloads
    counters = {name: torch.zeros_like(value) for name, value in TEACHER.items() if "num_batches" in name}
    assert_equal(read_encoder(tmp_path / "legacy.pth").weights, TEACHER | counters)

    safetensors.torch.save_file(to_half(resnet18_weights(1)), tmp_path / "in.safetensors", {"format": "pt"})
    assert_equal(read_encoder(tmp_path / "in.safetensors").weights, TEACHER)

    parameters = {name: nn.Parameter(value) if value.ndim else value for name, value in resnet18_weights(1).items()}
    torch.save(parameters, tmp_path / "parameters.pth")
    assert_equal(read_encoder(tmp_path / "parameters.pth").weights, TEACHER)


@pytest.mark.parametrize("container", ["model", "state_dict"])
def test_vit_of_gtsa_is_read_and_maps_images(container: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    state = add_prefix("momentum_encoder.", vit_weights(1)) | add_prefix("base_encoder.", vit_weights(2))
    state |= {"base_projector.0.weight": torch.ones(3)}
    torch.save({container: add_prefix("module.", state), "epoch": 100}, tmp_path / "in.pth")
    assert_equal(read_encoder(tmp_path / "in.pth").weights, without_classifier(vit_weights(1)))
    assert_equal(read_encoder(tmp_path / "in.pth", "student").weights, without_classifier(vit_weights(2)))
    encoder = load_encoder(tmp_path / "in.pth")
    assert (encoder.width, encoder.stride) == (192, 16)
    assert encoder(torch.zeros(2, 3, 64, 96)).shape == (2, 192, 4, 6)
    with pytest.raises(UsageError, match="--output-stride 16"):
        load_encoder(tmp_path / "in.pth", output_stride=16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture_is_inferred_from_its_librarys_shapes(arch: str) -> None:
    if arch in VITS:
        timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model(arch) if arch in VITS else torchvision.models.get_model(arch)
    weights = without_classifier(network.state_dict())
    assert infer_arch(weights, "file") == arch
    with torch.device("meta"):
        assert [(n, v.shape) for n, v in build_encoder(arch).state_dict().items()] == [
            (name, value.shape) for name, value in weights.items()
        ]


@pytest.mark.parametrize("arch", ["vit_small_patch12_224", "vit_tiny_patch60_224", "vit_large_patch224_224"])
def test_patch_size_of_a_vit_is_inferred(arch: str) -> None:
    with torch.device("meta"):
        assert infer_arch(build_encoder(arch).state_dict(), "file") == arch


def test_vit_of_another_image_size_is_refused_with_its_grid(tmp_path: Path) -> None:
    """As timm's ViTs for 384 px."""
    torch.save(vit_weights(1) | {"pos_embed": torch.ones(1, 24 * 24 + 1, 192)}, tmp_path / "in.pth")
    with pytest.raises(UsageError, match=r"vit_tiny_patch16_224.* is for 24 x 24 patches and should be for 14 x 14"):
        read_encoder(tmp_path / "in.pth")


@pytest.mark.parametrize("size", [0, 300])
def test_vit_of_an_impossible_patch_size_is_refused(size: int) -> None:
    weights = without_classifier(vit_weights(1)) | {"patch_embed.proj.weight": torch.ones(192, 3, size, size)}
    with pytest.raises(UsageError, match=rf"patch_embed.proj.weight is \(192, 3, {size}, {size}\) and should be"):
        infer_arch(weights, "file")


def test_vit_without_timm_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transfer.encoders

    torch.save(vit_weights(1), tmp_path / "in.pth")
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "models.vit", raising=False)
    transfer.encoders._encoder_shapes.cache_clear()
    with pytest.raises(UsageError, match=r"in\.pth: a ViT, which needs timm"):
        read_encoder(tmp_path / "in.pth")


def change(weights: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = weights | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


BROKEN = {
    "missing": (change(TEACHER, layer4__1__bn2__running_var=None), r"resnet18.*layer4\.1\.bn2\.running_var is missing"),
    "first missing": (change(TEACHER, conv1__weight=None), "resnet18.*conv1.weight is missing"),
    "surplus": (change(TEACHER, neck__weight=torch.ones(2)), "resnet18.*neck.weight has no place in it"),
    "other shape": (
        change(TEACHER, conv1__weight=torch.ones(64, 4, 7, 7)),
        r"conv1\.weight is \(64, 4, 7, 7\) and should be \(64, 3, 7, 7\)",
    ),
    "not finite": (
        change(TEACHER, bn1__bias=torch.full((64,), torch.nan)),
        "bn1.bias holds values that are not finite",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_incomplete_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    weights, reason = BROKEN[kind]
    torch.save({"model": add_prefix("module.encoder_k.", to_half(weights))}, tmp_path / "in.pth")
    with pytest.raises(UsageError, match=f"in.pth.*{reason}"):
        read_encoder(tmp_path / "in.pth")


def test_incomplete_vit_is_refused(tmp_path: Path) -> None:
    for name in ("blocks.3.attn.qkv.bias", "patch_embed.proj.weight", "cls_token"):
        weights = {key: value for key, value in vit_weights(1).items() if key != name}
        torch.save(add_prefix("encoder_k.", weights), tmp_path / "in.pth")
        with pytest.raises(UsageError, match=f"not a complete vit_tiny_patch16_224.*{name}"):
            read_encoder(tmp_path / "in.pth")


def test_vit_with_a_tensor_of_no_dimensions_is_refused(tmp_path: Path) -> None:
    for name in ("patch_embed.proj.weight", "pos_embed"):
        torch.save(vit_weights(1) | {name: torch.tensor(1.0)}, tmp_path / "in.pth")
        with pytest.raises(UsageError, match=rf"not a complete vit_tiny_patch16_224.*{name} is \(\) and should be"):
            read_encoder(tmp_path / "in.pth")


def test_unknown_architecture_is_refused_with_the_closest_one() -> None:
    with torch.device("meta"):
        shallow = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]).state_dict()
    with pytest.raises(UsageError, match=r"the closest known architecture .*layer"):
        infer_arch(without_classifier(shallow), "file")


def test_encoder_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    torch.save({"model": add_prefix("encoder_k.", to_half(TEACHER))}, tmp_path / "teacher.pth")
    with pytest.raises(UsageError, match="no student in it, its only encoder is the teacher; omit --encoder"):
        read_encoder(tmp_path / "teacher.pth", "student")
    torch.save(to_half(TEACHER), tmp_path / "backbone.pth")
    with pytest.raises(UsageError, match="no teacher in it, its only encoder is neither teacher nor student"):
        read_encoder(tmp_path / "backbone.pth", "teacher")
    torch.save({"model": {"projector.weight": torch.ones(2)}}, tmp_path / "none.pth")
    with pytest.raises(UsageError, match="no encoder in it"):
        read_encoder(tmp_path / "none.pth")


VALID = {"format": "timm", "source": "in.pth", "source_sha256": "0", "encoder": "only"}


def test_provenance_is_read_from_dicts_and_json_and_by_its_old_key() -> None:
    assert read_provenance({"provenance": VALID}) == VALID
    assert read_provenance({"provenance": json.dumps(VALID)}) == VALID
    assert read_provenance({"provenance": VALID | {"colour_order": "BGR"}}) == VALID | {"color_order": "BGR"}
    assert read_provenance({"provenance": VALID | {"unknown": torch.ones(2)}}) == VALID  # which JSON could not hold


@pytest.mark.parametrize(
    "provenance",
    [
        None, "made by hand", "[" * 100_000, ["a"], 3, {"format": "theirs"}, VALID | {"source": 3},
        VALID | {"source": "a\nb"}, VALID | {"arch": "a\nb"},
        VALID | {"mean": [0.5]}, VALID | {"std": "0.5"}, VALID | {"mean": [1, 2, "3"]}, VALID | {"color_order": "CMY"},
        VALID | {"mean": [10**400, 0, 0]}, VALID | {"epoch": [3]}, VALID | {"method": 3},
    ],
)  # fmt: skip
def test_provenance_of_other_programs_is_ignored(provenance: Any) -> None:
    assert read_provenance({"provenance": provenance}) == {}


def test_output_stride_of_a_resnet_is_dilation_of_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(build_encoder("resnet50").state_dict(), tmp_path / "in.pth")
    encoder = load_encoder(tmp_path / "in.pth", output_stride=16)
    assert (encoder.width, encoder.stride) == (2048, 16)
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 4, 4)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
