"""The file formats of other frameworks: their names for a ResNet's tensors, and how the files are written and read."""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from transfer.encoders import PROVENANCE, EncoderWeights
from utils.checkpoint import Weights
from utils.errors import UsageError
from utils.files import atomic_write
from utils.safe_pickle import load_arrays


@dataclass(frozen=True)
class Format:
    """How a framework stores an encoder."""

    write: Callable[[BinaryIO, Weights, dict[str, Any]], object]
    """Writes weights, by the framework's names, and their provenance into an open file."""
    vits: bool = False
    """Whether it takes ViTs by timm's names as well as ResNets."""
    rename: Callable[[str], str] = str
    """Maps torchvision's name of a ResNet's tensor to the framework's."""


def detectron2_name(name: str) -> str:
    """Map torchvision's name of a ResNet's tensor to detectron2's, below `backbone.bottom_up.`.

    `layer1.0.conv1.weight` -> `res2.0.conv1.weight`, `layer1.0.bn1.bias` -> `res2.0.conv1.norm.bias`,
    `layer1.0.downsample.0.weight` -> `res2.0.shortcut.weight`, `bn1.weight` -> `stem.conv1.norm.weight`.
    """
    stage = re.match(r"layer(\d)\.", name)
    name = f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"bn(\d)\.", r"conv\1.norm.", name)


def torchvision_name(name: str) -> str:
    """Map detectron2's name of a ResNet's tensor to torchvision's; the inverse of `detectron2_name`."""
    name = name.removeprefix("stem.").replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
    return re.sub(r"^res(\d)\.", lambda stage: f"layer{int(stage[1]) - 1}.", name)


def _write_torch(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    torch.save({"state_dict": weights, PROVENANCE: provenance}, file)


def _write_safetensors(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    file.write(safetensors.torch.save(weights, metadata={"format": "pt", PROVENANCE: json.dumps(provenance)}))


def _write_detectron2(file: BinaryIO, weights: Weights, provenance: dict[str, Any]) -> None:
    # With `matching_heuristics` detectron2 adds its own prefix to each name: `backbone.bottom_up.` (FPN) or
    # `backbone.` (C4).
    model = {name: value.numpy() for name, value in weights.items()}
    state = {"model": model, "__author__": "slot pre-training", "matching_heuristics": True, PROVENANCE: provenance}
    pickle.dump(state, file, protocol=4)


FORMATS = {
    "torchvision": Format(_write_torch),
    "timm": Format(_write_torch, vits=True),
    "detectron2": Format(_write_detectron2, rename=detectron2_name),
    "mmseg": Format(_write_torch),
    "safetensors": Format(_write_safetensors, vits=True),
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
    try:
        atomic_write(path, lambda file: format_.write(file, weights, encoder.provenance | {"format": target}))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


def read_detectron2(path: Path) -> dict[str, Any]:
    """Read a converted detectron2 `.pkl` without running code: `model`, arrays by its names, and provenance.

    Raises:
        UsageError: the file is missing, damaged, holds code, or has no such arrays.
    """
    state = load_arrays(path, "converted")
    model = state.get("model")
    entries = model.items() if isinstance(model, dict) else [("", None)]
    if not all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in entries):
        raise UsageError(f"{path}: no detectron2 file; make one with transfer/detection/convert_pretrain_to_d2.py")
    return state
