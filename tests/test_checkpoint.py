"""Checkpoints: the weights and the encoder in files of all kinds, initialization, damaged files."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from models import build_method
from tests.checkpoint_data import RELEASED_GTSA, add_prefix, assert_equal, resnet18_weights, without_classifier
from tests.helpers import build_small_vit
from transfer.encoders import EncoderWeights
from transfer.formats import write_converted
from utils import checkpoint
from utils.errors import UsageError
from utils.vit_names import detectron2_vit_name

CLASSIFIER = {"fc.weight": torch.ones(2)}
STUDENT = {"conv1.weight": torch.ones(2), "bn1.running_mean": torch.ones(2), "bn1.num_batches_tracked": torch.tensor(5)}
TEACHER = {name: value + 1 for name, value in STUDENT.items()}
VIT = {"patch_embed.proj.weight": torch.ones(2), "blocks.0.norm1.weight": torch.ones(2)}
MMSEG_VIT = {"patch_embed.projection.weight": torch.ones(2), "layers.0.ln1.weight": torch.ones(2)}
SLOTCON = add_prefix("encoder_q.", STUDENT) | add_prefix("encoder_k.", TEACHER) | {"bn9.running_mean": torch.ones(2)}
GTSA = add_prefix("base_encoder.", STUDENT) | add_prefix("momentum_encoder.", TEACHER | CLASSIFIER)
STEM = {
    "conv1.weight": "weight",
    "bn1.running_mean": "norm.running_mean",
    "bn1.num_batches_tracked": "norm.num_batches_tracked",
}
DETECTRON2 = {f"stem.conv1.{STEM[name]}": value for name, value in STUDENT.items()}
LAST_STAGE = {"roi_heads.res5.0.conv1.weight": torch.ones(2), "roi_heads.res5.norm.weight": torch.ones(2)}
HEADS = {"backbone.fpn_lateral2.weight": torch.ones(2), "roi_heads.box_head.fc1.weight": torch.ones(2)}
OTHERS = {"encoderx.weight": torch.ones(2), "decode_head.weight": torch.ones(2)}

FILES: dict[str, tuple[dict[str, Any], str, dict[str, Tensor]]] = {
    "slotcon": ({"model": add_prefix("module.", SLOTCON)}, "teacher", TEACHER),
    "slotcon, only student": ({"model": add_prefix("encoder_q.", STUDENT)}, "student", STUDENT),
    "gtsa": ({"state_dict": add_prefix("module.", GTSA)}, "teacher", TEACHER),
    "gtsa, only student": ({"model": add_prefix("base_encoder.", STUDENT)}, "student", STUDENT),
    "encoder.": ({"state_dict": add_prefix("encoder.", STUDENT | CLASSIFIER)}, "only", STUDENT),
    "backbone.": (add_prefix("module.backbone.", STUDENT) | OTHERS, "only", STUDENT),
    "torchvision": (STUDENT | CLASSIFIER, "only", STUDENT),
    "backbone-only": ({"model": STUDENT, "epoch": 3}, "only", STUDENT),
    "timm": ({"state_dict": VIT | {"head.weight": torch.ones(2)}}, "only", VIT),
    "mmseg's ViT": ({"state_dict": MMSEG_VIT}, "only", VIT),
    "segmentor with a ViT": ({"state_dict": add_prefix("backbone.", MMSEG_VIT) | OTHERS}, "only", VIT),
    "detectron2's ViT": ({"model": add_prefix("backbone.net.", VIT) | HEADS}, "only", VIT),
    "detectron2's backbone": ({"model": DETECTRON2}, "only", STUDENT),
    "detectron2 FPN": ({"model": add_prefix("backbone.bottom_up.", DETECTRON2) | HEADS}, "only", STUDENT),
    "detectron2 C4": (
        {"model": add_prefix("backbone.", DETECTRON2) | LAST_STAGE},
        "only",
        STUDENT | {"layer4.0.conv1.weight": torch.ones(2)},
    ),
    "none": ({"model": {"encoder_k.fc.weight": torch.ones(2)} | OTHERS}, "", {}),
}


@pytest.mark.parametrize("file", FILES)
def test_encoder_is_found_in_files_of_all_kinds(file: str) -> None:
    state, which, expected = FILES[file]
    selected, weights = checkpoint.find_encoder(checkpoint.extract_weights(state, "file"))
    assert selected == which
    assert_equal(weights, expected)


@pytest.mark.parametrize("weights", [SLOTCON, GTSA])
def test_student_is_found_where_it_is_preferred(weights: dict[str, Tensor]) -> None:
    weights = checkpoint.extract_weights(weights, "file")
    selected, student = checkpoint.find_encoder(weights, prefer="student")
    assert selected == "student"
    assert_equal(student, STUDENT)


def test_batch_counters_missing_before_torch_0_4_are_added() -> None:
    old = {name: value for name, value in STUDENT.items() if "num_batches" not in name}
    counter = {"bn1.num_batches_tracked": torch.tensor(0)}
    assert_equal(checkpoint.find_encoder(add_prefix("encoder_k.", old))[1], old | counter)


@pytest.mark.parametrize(
    "state", [{"epoch": 3}, {}, {0: torch.ones(2)}, {"model": {"text": "a"}}, {"a\nb": torch.ones(2)}]
)
def test_state_without_weights_is_refused(state: dict[Any, Any]) -> None:
    with pytest.raises(UsageError, match=r"file\.pth: no weights"):
        checkpoint.extract_weights(state, "file.pth")


def test_checkpoint_args_are_a_dict_or_empty() -> None:
    assert checkpoint.checkpoint_args({"args": {"arch": "resnet18", 3: "not an argument"}}) == {"arch": "resnet18"}
    assert checkpoint.checkpoint_args({"args": "resnet18"}) == checkpoint.checkpoint_args({}) == {}


def test_first_mismatch_names_the_tensor() -> None:
    expected = {"a": torch.ones(2), "b": (3, 4)}
    assert checkpoint.first_mismatch({"a": torch.ones(2), "b": torch.ones(3, 4)}, expected) == ""
    assert checkpoint.first_mismatch({"a": torch.ones(2)}, expected) == "b is missing"
    assert (
        checkpoint.first_mismatch({"a": torch.ones(5), "b": torch.ones(3, 4)}, expected)
        == "a is (5,) and should be (2,)"
    )
    assert checkpoint.first_mismatch({"0": torch.ones(2)}, {}) == "0 has no place in it"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": None}, "weight is missing"),
        ({"extra": torch.ones(1)}, "extra has no place in this model"),
        ({"weight": torch.ones(3, 2)}, r"weight is \(3, 2\) and should be \(1, 2\)"),
        ({"weight": "text"}, "weight is not a tensor"),
    ],
)
def test_load_strict_names_the_first_difference(change: dict[str, Any], reason: str) -> None:
    module = nn.Linear(2, 1)
    weights = {name: value for name, value in (module.state_dict() | change).items() if value is not None}
    with pytest.raises(UsageError, match=rf"--init x: {reason}"):
        checkpoint.load_strict(module, weights, "--init x")


# Starting a run from a file.


def save_file(path: Path, state: dict[str, Any]) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["gtsa", "only teacher", "encoder.", "torchvision", "detectron2"])
def test_run_starts_from_files_of_all_kinds(kind: str, tiny_args: argparse.Namespace, tmp_path: Path) -> None:
    resnet = resnet18_weights(1)
    teacher, student = without_classifier(resnet), without_classifier(resnet18_weights(2))
    gtsa = add_prefix("module.base_encoder.", student) | add_prefix("module.momentum_encoder.", teacher)
    states: dict[str, dict[str, Any]] = {
        "gtsa": {"model": gtsa},
        "only teacher": add_prefix("encoder_k.", teacher),
        "encoder.": {"state_dict": add_prefix("encoder.", resnet)},
        "torchvision": resnet,
    }
    method, path = build_method(tiny_args), tmp_path / "in.pth"
    if kind == "detectron2":
        path = tmp_path / "in.pkl"
        write_converted(path, EncoderWeights(teacher, "resnet18", {}), "detectron2")
    else:
        save_file(path, states[kind])
    assert copied_parts(method, path) == {"encoder_q", "encoder_k"}
    assert_equal(method.encoder_q.state_dict(), student if kind == "gtsa" else teacher)
    assert_equal(method.encoder_k.state_dict(), teacher)


def copied_parts(method: nn.Module, path: Path) -> set[str]:
    """Return the names of the parts that a method copies from a file."""
    return {name for name, reason in checkpoint.initialize_from(method, path).items() if not reason}


def test_run_starts_from_all_parts_and_keeps_prototypes_of_another_number(
    tiny: Callable[..., list[str]], tiny_args: argparse.Namespace, tmp_path: Path
) -> None:
    import main_pretrain

    source = build_method(tiny_args)
    path = save_file(tmp_path / "in.pth", {"model": add_prefix("module.", source.state_dict())})
    same, other = build_method(tiny_args), build_method(main_pretrain.parse_args(tiny("--num-prototypes", "9")))
    everything = {name for name, _ in source.named_children()} | {"center"}
    assert copied_parts(same, path) == everything
    assert_equal(same.state_dict(), source.state_dict())
    assert copied_parts(other, path) == everything - {"grouping_q", "grouping_k", "center"}
    reason = checkpoint.initialize_from(other, path)["grouping_q"]
    assert reason == "slot_embed.weight is (8, 16) and should be (9, 16)"


@pytest.fixture
def build_with_vit(tiny: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Build a method with a small ViT."""
    import main_pretrain

    for module in ("models.gtsa", "models.slotcon"):
        monkeypatch.setattr(f"{module}.build_encoder", build_small_vit)

    def build(method: str, *flags: str) -> Any:
        return build_method(
            main_pretrain.parse_args(tiny("--method", method, "--arch", "vit_tiny_patch16_224", *flags))
        )

    return build


def released_gtsa(method: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Return a checkpoint of a method as the authors of GTSA name its parts, with other names in the heads."""
    model = {}
    for released, name in RELEASED_GTSA.items():
        for key, value in method.get_submodule(name).state_dict().items():
            in_head = key if "encoder" in name else f"layers.{key}"
            model[f"{prefix}{released}.{in_head}"] = value
    return {"args": argparse.Namespace(arch="vit_small"), "model": model, "epoch": 100}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_run_starts_from_all_parts_of_a_released_gtsa_checkpoint(
    prefix: str, build_with_vit: Callable[..., Any], tmp_path: Path
) -> None:
    source, method = build_with_vit("gtsa"), build_with_vit("gtsa")
    for value in source.encoder_k.state_dict().values():
        value += 1  # so that student and teacher differ
    path = save_file(tmp_path / "in.pth", released_gtsa(source, prefix))
    assert copied_parts(method, path) == set(RELEASED_GTSA.values())
    assert_equal(method.state_dict(), source.state_dict())


def test_heads_of_a_released_gtsa_checkpoint_that_do_not_fit_keep_their_initial_values(
    build_with_vit: Callable[..., Any], tmp_path: Path
) -> None:
    source, method = build_with_vit("gtsa"), build_with_vit("gtsa", "--dim-out", "24")
    path = save_file(tmp_path / "in.pth", released_gtsa(source))
    initial = {name: value.clone() for name, value in method.projector_q.state_dict().items()}
    assert copied_parts(method, path) == {"encoder_q", "encoder_k", "rotation_head"}
    assert_equal(method.encoder_k.state_dict(), source.encoder_k.state_dict())
    assert_equal(method.projector_q.state_dict(), initial)


def test_run_starts_from_its_own_gtsa_checkpoint_only_if_all_parts_fit_by_name(
    build_with_vit: Callable[..., Any], tmp_path: Path
) -> None:
    source = build_with_vit("gtsa")
    path = save_file(tmp_path / "in.pth", {"model": source.state_dict()})
    same, other = build_with_vit("gtsa"), build_with_vit("gtsa", "--dim-out", "24")
    assert copied_parts(same, path) == set(RELEASED_GTSA.values())
    with pytest.raises(UsageError, match=r"--init .*in\.pth: projector_q: 2\.bias is \(16,\) and should be \(24,\)"):
        checkpoint.initialize_from(other, path)
    renamed = {name.replace("predictor.", "predictor.layers."): value for name, value in source.state_dict().items()}
    save_file(path, {"model": renamed})
    with pytest.raises(UsageError, match=r"--init .*in\.pth: predictor: .* is missing"):
        checkpoint.initialize_from(same, path)


def test_slotcon_starts_from_the_encoders_of_gtsa(build_with_vit: Callable[..., Any], tmp_path: Path) -> None:
    source, method = build_with_vit("gtsa"), build_with_vit("slotcon")
    path = save_file(tmp_path / "in.pth", released_gtsa(source))
    assert copied_parts(method, path) == {"encoder_q", "encoder_k"}
    assert_equal(method.encoder_q.state_dict(), source.encoder_q.state_dict())


def test_run_does_not_start_from_a_vit_of_another_image_size_or_of_detectron2(
    build_with_vit: Callable[..., Any], tmp_path: Path
) -> None:
    method = build_with_vit("gtsa")
    weights = method.encoder_q.state_dict()
    path = save_file(tmp_path / "in.pth", weights | {"pos_embed": torch.ones(1, 24 * 24 + 1, 24)})
    with pytest.raises(UsageError, match="encoder_q: pos_embed is for 24 x 24 patches and should be for 14 x 14; use"):
        checkpoint.initialize_from(method, path)
    in_detectron2 = {f"backbone.net.{name}": value for name, value in weights.items() if detectron2_vit_name(name)}
    path = save_file(tmp_path / "detector.pth", {"model": in_detectron2})
    with pytest.raises(UsageError, match=r"--init .*detector\.pth: a ViT of detectron2, without class token and final"):
        checkpoint.initialize_from(method, path)


def test_run_does_not_start_from_another_architecture_or_no_encoder(
    tiny_args: argparse.Namespace, tmp_path: Path
) -> None:
    weights = resnet18_weights(1) | {"layer1.0.conv3.weight": torch.ones(2)}
    with pytest.raises(UsageError, match=r"encoder_q: layer1\.0\.conv3\.weight has no place .* --arch"):
        checkpoint.initialize_from(build_method(tiny_args), save_file(tmp_path / "in.pth", weights))
    with pytest.raises(UsageError, match="no encoder"):
        checkpoint.initialize_from(build_method(tiny_args), save_file(tmp_path / "in.pth", {"a": torch.ones(2)}))


@pytest.mark.usefixtures("small_encoder")
@pytest.mark.parametrize("name", ["encoder_q.1.weight", "grouping_k.slot_embed.weight"])
def test_run_does_not_start_from_values_that_are_not_finite(
    name: str, tiny_args: argparse.Namespace, tmp_path: Path
) -> None:
    weights = build_method(tiny_args).state_dict()
    weights[name].view(-1)[1] = float("nan")
    part = name.split(".")[0]
    with pytest.raises(UsageError, match=rf"^--init .*in\.pth: {part}: .*weight holds values that are not finite; use"):
        checkpoint.initialize_from(build_method(tiny_args), save_file(tmp_path / "in.pth", {"model": weights}))


# Files that cannot be read or written.


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text"])
def test_file_that_is_no_checkpoint_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{suffix}"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("no checkpoint" * (kind == "text"))
    reason = {"missing": "no such file", "folder": "is a folder"}.get(kind, "no checkpoint")
    with pytest.raises(UsageError, match=rf"^--resume .*in\{suffix}: .*{reason}"):
        checkpoint.load(path, "--resume")


@pytest.mark.parametrize("state", [[torch.ones(2)], torch.ones(2), 3])
def test_file_of_something_else_is_refused(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(UsageError, match=f"holds a {type(state).__name__}"):
        checkpoint.load(tmp_path / "in.pth", "--init")


@pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_file_is_refused(kind: str, fraction: float, tmp_path: Path) -> None:
    path = tmp_path / ("in.safetensors" if kind == "safetensors" else "in.pth")
    weights = {f"layer{number}.weight": torch.randn(50, 50) for number in range(4)}
    if kind == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    assert_equal(checkpoint.load_weights(path), weights)
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(UsageError, match=r"--init .*in\."):
        checkpoint.load_weights(path)


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "current.pth"
    checkpoint.save(path, {"epoch": 1})

    def fail(state: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos 60697856 vs 60697752")  # what torch raises on a full disk

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UsageError, match=r"--output-dir: .*current\.pth cannot be written .* intact"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path, "--resume") == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["current.pth"]
