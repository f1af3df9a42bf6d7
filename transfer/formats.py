"""The file formats of other frameworks, and how the files are written; `utils.checkpoint` reads all of them."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from transfer.encoders import PROVENANCE, EncoderWeights
from utils.checkpoint import Weights
from utils.errors import UsageError
from utils.files import write_output
from utils.integrity import CHECKSUM, add_checksum
from utils.resnet_names import detectron2_name


@dataclass(frozen=True)
class Format:
    """How a framework stores an encoder."""

    write: Callable[[BinaryIO, Weights, dict[str, Any]], object]
    """Writes weights, by the framework's names, and their provenance into an open file."""
    suffixes: tuple[str, ...] = (".pth", ".pt")
    """The suffixes of its files, the usual one first."""
    vits: bool = False
    """Whether it takes ViTs by timm's names as well as ResNets."""
    rename: Callable[[str], str] = str
    """Maps torchvision's name of a ResNet's tensor to the framework's."""


def _write_torch(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    torch.save({"state_dict": weights, PROVENANCE: provenance}, file)


def _write_safetensors(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    metadata = {"format": "pt", PROVENANCE: json.dumps(provenance)}
    checksum = add_checksum({**metadata, **weights})[CHECKSUM]
    file.write(safetensors.torch.save(weights, metadata | {CHECKSUM: checksum}))


def _write_detectron2(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    # With `matching_heuristics` detectron2 adds its own prefix to each name: `backbone.bottom_up.` (FPN) or
    # `backbone.` (C4).
    model = {name: value.numpy() for name, value in weights.items()}
    state = {"model": model, "__author__": "slot pre-training", "matching_heuristics": True, PROVENANCE: provenance}
    pickle.dump(add_checksum(state), file, protocol=4)


FORMATS = {
    "torchvision": Format(_write_torch),
    "timm": Format(_write_torch, vits=True),
    "detectron2": Format(_write_detectron2, suffixes=(".pkl",), rename=detectron2_name),
    "mmseg": Format(_write_torch),
    "safetensors": Format(_write_safetensors, suffixes=(".safetensors",), vits=True),
}


def write_converted(path: Path, encoder: EncoderWeights, target: str) -> None:
    """Write `encoder` atomically in the format `target`, a key of FORMATS.

    Raises:
        UsageError: the framework has no such architecture, or the file cannot be written.
    """
    format_ = FORMATS[target]
    if encoder.arch.startswith("vit") and not format_.vits:
        names = " or ".join(name for name, other in FORMATS.items() if other.vits)
        raise UsageError(f"--to {target} has no {encoder.arch}; use transfer/convert.py --to {names}")
    weights = {format_.rename(name): value.contiguous() for name, value in encoder.weights.items()}
    provenance = encoder.provenance | {"format": target}
    write_output("OUT", path, lambda file: format_.write(file, weights, provenance))
