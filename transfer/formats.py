"""The file formats of other frameworks, and how the files are written; `utils.checkpoint` reads all of them."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from models.backbones import is_vit
from transfer.encoders import PROVENANCE, EncoderWeights
from utils.checkpoint import Weights
from utils.errors import UsageError
from utils.files import write_output
from utils.integrity import CHECKSUM, add_checksum
from utils.resnet_names import detectron2_name
from utils.vit_names import DETECTRON2_PREFIX, detectron2_vit_name, mmseg_vit_name


@dataclass(frozen=True)
class Format:
    """How a framework stores an encoder."""

    write: Callable[[BinaryIO, Weights, dict[str, Any]], object]
    """Writes weights, by the framework's names, and their provenance into an open file."""
    suffixes: tuple[str, ...] = (".pth", ".pt")
    """The suffixes of its files, the usual one first."""
    resnet_name: Callable[[str], str] = str
    """Maps torchvision's name of a ResNet's tensor to the framework's."""
    vit_name: Callable[[str], str | None] | None = None
    """Maps timm's name of a ViT's tensor to the framework's, or to None where its ViT has no such tensor.

    It is None itself for a framework without these ViTs.
    """

    def rename(self, encoder: EncoderWeights) -> Weights:
        """Return the weights that the framework's network has, by its names."""
        rename = self.vit_name if is_vit(encoder.arch) else self.resnet_name
        assert rename, encoder.arch
        renamed = ((rename(name), value) for name, value in encoder.weights.items())
        return {name: value.contiguous() for name, value in renamed if name}


def _write_torch(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    torch.save({"state_dict": weights, PROVENANCE: provenance}, file)


def _write_safetensors(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    metadata = {"format": "pt", PROVENANCE: json.dumps(provenance)}
    checksum = add_checksum({**metadata, **weights})[CHECKSUM]
    file.write(safetensors.torch.save(weights, metadata | {CHECKSUM: checksum}))


def _write_detectron2(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    # With `matching_heuristics` detectron2 adds its own prefix to each name of a ResNet: `backbone.bottom_up.` (FPN) or
    # `backbone.` (C4). The names of a ViT are complete.
    model = {name: value.numpy() for name, value in weights.items()}
    heuristics = {} if any(name.startswith(DETECTRON2_PREFIX) for name in model) else {"matching_heuristics": True}
    state = {"model": model, "__author__": "slot pre-training", **heuristics, PROVENANCE: provenance}
    pickle.dump(add_checksum(state), file, protocol=4)


FORMATS = {
    "torchvision": Format(_write_torch),
    "timm": Format(_write_torch, vit_name=str),
    "detectron2": Format(
        _write_detectron2, suffixes=(".pkl",), resnet_name=detectron2_name, vit_name=detectron2_vit_name
    ),
    "mmseg": Format(_write_torch, vit_name=mmseg_vit_name),
    "safetensors": Format(_write_safetensors, suffixes=(".safetensors",), vit_name=str),
}


def write_converted(path: Path, encoder: EncoderWeights, target: str) -> int:
    """Write `encoder` atomically in the format `target`, a key of FORMATS.

    Returns:
        The number of tensors in the file.

    Raises:
        UsageError: the framework has no such architecture, or the file cannot be written.
    """
    format_ = FORMATS[target]
    if is_vit(encoder.arch) and not format_.vit_name:
        others = [name for name, other in FORMATS.items() if other.vit_name]
        names = f"{', '.join(others[:-1])} or {others[-1]}"
        raise UsageError(f"{target} has no {encoder.arch}; use transfer/convert.py --to {names}")
    weights = format_.rename(encoder)
    provenance = encoder.provenance | {"format": target}
    write_output("OUT", path, lambda file: format_.write(file, weights, provenance))
    return len(weights)
