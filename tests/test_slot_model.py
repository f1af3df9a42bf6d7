"""Encoders and slots of checkpoints: equal to the networks that were saved, complete, frozen."""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tests.probe_data import make_method, save_checkpoint
from transfer.encoders import build_frozen_encoder, load_encoder, untrained_encoder
from transfer.slot_model import load_slot_model, untrained_slot_model
from utils.errors import UsageError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "current.pth")


def batch() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("which", "suffix", "released"), [(None, "k", False), ("student", "q", False), ("teacher", "k", True)]
)
@torch.no_grad()
def test_encoder_and_slot_model_equal_those_of_the_saved_method(
    which: str | None, suffix: str, released: bool, checkpoint: Path, tmp_path: Path
) -> None:
    method = make_method()
    if released:  # the authors' files hold a Namespace and DDP's prefix
        state = {f"module.{name}": value for name, value in method.state_dict().items()}
        checkpoint = tmp_path / "slotcon.pth"
        torch.save({"args": argparse.Namespace(arch="resnet50"), "model": state, "epoch": 800}, checkpoint)
    encoder, model = load_encoder(checkpoint, which), load_slot_model(checkpoint, which)
    assert model.which == (which or "teacher")
    for network in (encoder, model):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    expected = getattr(method, f"encoder_{suffix}")(batch())
    projected = getattr(method, f"projector_{suffix}")(expected)
    prototypes = getattr(method, f"grouping_{suffix}").slot_embed.weight
    torch.testing.assert_close(encoder(batch()), expected)
    assert torch.equal(model.prototypes, prototypes)
    projections, scores = model(batch())
    torch.testing.assert_close(projections, projected)
    cosine = F.cosine_similarity(projected[:, None], prototypes[None, :, :, None, None], dim=2)
    torch.testing.assert_close(scores, cosine)


@torch.no_grad()
def test_torchvision_checkpoint_gives_its_network_and_has_no_slots(tmp_path: Path) -> None:
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18().eval()
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    expected = nn.Sequential(*list(resnet.children())[:-2])(batch())
    torch.testing.assert_close(load_encoder(tmp_path / "resnet18.pth")(batch()), expected)
    with pytest.raises(UsageError, match=r"no prototypes in it; use a complete checkpoint of slotcon or slotfa$"):
        load_slot_model(tmp_path / "resnet18.pth")


@pytest.mark.parametrize("damage", ["missing layer", "other width", "not finite"])
def test_damaged_slot_model_is_refused(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    model = torch.load(checkpoint, weights_only=True)["model"]
    if damage == "missing layer":
        del model["projector_k.mlp.6.weight"]
    elif damage == "other width":
        model["grouping_k.slot_embed.weight"] = torch.ones(8, 12)
    else:
        model["grouping_k.slot_embed.weight"][3, 1] = torch.nan
    torch.save({"model": model}, tmp_path / "damaged.pth")
    with pytest.raises(UsageError, match=r"damaged\.pth"):
        load_slot_model(tmp_path / "damaged.pth")


def test_untrained_encoder_depends_on_its_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    first, again, other = (untrained_encoder("resnet18", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    name = "layer3.0.conv1.weight"
    assert torch.equal(first.weights[name], again.weights[name])
    assert not torch.equal(first.weights[name], other.weights[name])
    assert first.provenance == again.provenance
    assert first.provenance.keys() >= {"color_order", "mean", "std"}
    assert first.provenance["source_sha256"] != other.provenance["source_sha256"]


def test_untrained_slot_model_has_the_shapes_of_the_trained_one(checkpoint: Path) -> None:
    model = load_slot_model(checkpoint)
    network = build_frozen_encoder(untrained_encoder("resnet18", 0))
    first, again, other = (untrained_slot_model(model, network, seed) for seed in (0, 0, 1))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in first.state_dict().items()} == shapes
    assert torch.equal(first.prototypes, again.prototypes)
    assert not torch.equal(first.prototypes, other.prototypes)
