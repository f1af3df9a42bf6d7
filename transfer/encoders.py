"""An encoder out of any checkpoint: found, identified by its shapes, complete, and with word of where it comes from."""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones import ARCHITECTURES, build_encoder
from utils import checkpoint
from utils.batch import MEAN, STD
from utils.checkpoint import Weights
from utils.errors import UsageError

Shapes = dict[str, tuple[int, ...]]

PROVENANCE = "provenance"
"""The key under which a converted file tells where it comes from."""

_VITS = {
    (192, 12): ("tiny", (16,)),
    (384, 12): ("small", (8, 16, 32)),
    (768, 12): ("base", (8, 16, 32)),
    (1024, 24): ("large", (14, 16, 32)),
}
"""Width and depth -> timm's name, and the patches that it has weights or models for."""


_KNOWN_BY = ("format", "source", "encoder", "source_sha256")


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder's weights, all of them and of the right shapes."""

    weights: Weights
    """float32 on the CPU, by torchvision's names (ResNets) or timm's (ViTs), without a classifier."""
    arch: str
    """torchvision's or timm's name, such as `resnet50`, `vit_small_patch16_224`."""
    provenance: dict[str, Any]
    """Source file and its SHA-256, method and epoch where it tells them, which encoder of it, and the input that it
    wants: color order, mean and standard deviation of levels 0..1."""


def read_encoder(path: Path | str, which: str | None = None) -> EncoderWeights:
    """The encoder in a checkpoint of this project, a released one, a backbone-only file, or torchvision's or timm's.

    Args:
        which: `teacher` or `student`; None for the teacher where there are both, else the one that there is.

    Raises:
        UsageError: the file is missing, damaged or holds code; it has no such encoder, or not a whole one.
    """
    try:
        state = checkpoint.load(path, "checkpoint")
    except UsageError:
        if Path(path).suffix == ".pkl" and os.access(path, os.R_OK) and _is_detectron2(Path(path)):
            message = f"{path}: already converted to detectron2; give the checkpoint that it was made from"
            raise UsageError(message) from None
        raise
    found, weights = checkpoint.find_encoder(checkpoint.extract_weights(state, f"checkpoint {path}"), which or "teacher")
    if not weights:
        raise UsageError(
            f"{path}: no encoder in it (looked for encoder_k., encoder_q., momentum_encoder., base_encoder., "
            "encoder., backbone. and bare names of ResNets and ViTs)"
        )
    if which and found != which:
        raise UsageError(f"{path}: no {which} in it, its encoder is {_called(found)}; leave --encoder out to take it")
    # Copies: a tensor may be a view of a larger one, or shared.
    weights = {name: (value.float() if value.is_floating_point() else value).clone() for name, value in weights.items()}
    arch = infer_arch(weights, str(path))
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UsageError(f"{path}: {name} holds values that are not finite; use an earlier checkpoint")
    provenance = converted_from(state) or checkpoint_metadata(state) | {
        "arch": arch,
        "encoder": found,
        "source": Path(path).name,
        "source_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "color_order": "RGB",
        "mean": list(MEAN),
        "std": list(STD),
    }
    return EncoderWeights(weights, arch, provenance)


def load_encoder(path: Path | str, which: str | None = None, output_stride: int = 32) -> nn.Module:
    """The encoder of any checkpoint, frozen: normalized RGB images (B, 3, H, W) -> map (B, C, h, w).

    Args:
        which: `teacher` or `student`; None for the teacher where there are both.
        output_stride: pixels to a cell of a ResNet, below 32 by dilation; a ViT's is its patch.

    Raises:
        UsageError: as `read_encoder`.
    """
    return build_network(read_encoder(path, which), output_stride)


def build_network(encoder: EncoderWeights, output_stride: int = 32) -> nn.Module:
    """`encoder` as a frozen network in evaluation mode."""
    if encoder.arch.startswith("vit"):
        if output_stride != 32:
            raise UsageError(f"--output-stride {output_stride}: a {encoder.arch}'s cell is its patch; leave it out")
        network: nn.Module = _TokenMap(encoder)
    else:
        with torch.device("meta"):
            network = _build_encoder(encoder.arch, output_stride)
        network.load_state_dict(encoder.weights, assign=True)
    return network.eval().requires_grad_(False)


def untrained_encoder(arch: str, seed: int) -> EncoderWeights:
    """An encoder as pre-training starts with it: the baseline of every probe."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _create_vit(arch) if arch.startswith("vit") else _build_encoder(arch)
    fingerprint = hashlib.sha256(f"untrained {arch} {seed}".encode()).hexdigest()
    facts = {"arch": arch, "encoder": "untrained", "source": f"random, seed {seed}", "source_sha256": fingerprint}
    return EncoderWeights(network.state_dict(), arch, facts)


def _build_encoder(arch: str, output_stride: int = 32) -> nn.Module:
    network = build_encoder(arch, output_stride)
    return network[0] if isinstance(network, tuple) else network


def _create_vit(arch: str) -> Any:
    try:
        import timm
    except ImportError:
        raise UsageError(f"a {arch} needs timm; pip install timm") from None
    return timm.create_model(arch, num_classes=0, dynamic_img_size=True)


class _TokenMap(nn.Module):
    """timm's ViT whose patch tokens are laid out as a map."""

    def __init__(self, encoder: EncoderWeights):
        super().__init__()
        self.vit = _create_vit(encoder.arch)
        self.vit.load_state_dict(encoder.weights)

    def forward(self, images: Tensor) -> Tensor:
        patch = self.vit.patch_embed.patch_size[0]
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // patch, images.shape[3] // patch))


def infer_arch(weights: Weights, where: str) -> str:
    """The architecture that has exactly these names and shapes.

    Raises:
        UsageError: none has; it names the closest one and the first difference.
    """
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    candidates = {arch: resnet_shapes(arch) for arch in ARCHITECTURES} | _vit_candidate(shapes)
    arch = max(candidates, key=lambda name: len(candidates[name].items() & shapes.items()))
    expected = candidates[arch]
    if first := checkpoint.first_mismatch(weights, expected):
        raise UsageError(f"{where}: not a whole {arch}, the closest known architecture ({first})")
    return arch


@cache
def resnet_shapes(arch: str) -> Shapes:
    """Names and shapes of a torchvision ResNet's tensors, without its classifier."""
    with torch.device("meta"):
        encoder = _build_encoder(arch)
    return {name: tuple(value.shape) for name, value in encoder.state_dict().items()}


def _vit_candidate(shapes: Shapes) -> dict[str, Shapes]:
    """The ViT of timm that has this patch embedding and depth, if it is one that timm names."""
    if len(embedding := shapes.get("patch_embed.proj.weight", ())) != 4:
        return {}
    width, _, patch, _ = embedding
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    name, patches = _VITS.get((width, depth), ("", ()))
    return {f"vit_{name}_patch{patch}_224": vit_shapes(width, depth, patch)} if patch in patches else {}


def vit_shapes(width: int, depth: int, patch: int) -> Shapes:
    """Names and shapes of timm's ViT for 224 px with a class token, without its classifier."""
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    parts: Shapes = {"patch_embed.proj": (width, 3, patch, patch), "norm": (width,)}
    for block in range(depth):
        parts |= {f"blocks.{block}.{name}": shape for name, shape in linears.items()}
        parts |= {f"blocks.{block}.norm{number}": (width,) for number in (1, 2)}
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + (224 // patch) ** 2, width)}
    for name, shape in parts.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def converted_from(state: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance that a converted file carries (`.safetensors` as JSON); empty for others."""
    carried = state.get(PROVENANCE)
    if isinstance(carried, str):
        try:
            carried = json.loads(carried)
        except ValueError:
            return {}
    known = isinstance(carried, Mapping) and all(isinstance(carried.get(name), str) for name in _KNOWN_BY)
    return dict(carried) if known and isinstance(carried, Mapping) else {}


def checkpoint_metadata(state: Mapping[str, Any]) -> dict[str, Any]:
    """Method and epoch, as far as a checkpoint tells them."""
    args = state.get("args")
    told = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    told = {"method": told.get("method"), "epoch": state.get("epoch")}
    return {name: value for name, value in told.items() if isinstance(value, (str, int))}


def _is_detectron2(path: Path) -> bool:
    """Whether a file holds detectron2's names; looked for as bytes, for its format is a pickle that could hold code."""
    return path.is_file() and b"stem.conv1" in path.read_bytes()


def _called(found: str) -> str:
    return "the only one, neither teacher nor student" if found == "only" else f"the {found}"
