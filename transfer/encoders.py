"""Read the encoder of any checkpoint, infer its architecture from names and shapes, and build it."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.backbones import RESNETS, VITS, build_encoder, with_patch_size
from utils import checkpoint
from utils.batch import MEAN, STD
from utils.checkpoint import Weights
from utils.errors import UsageError

PROVENANCE = "provenance"
"""The key of the provenance in a converted file."""

_DEFAULT_INPUT = {"color_order": "RGB", "mean": list(MEAN), "std": list(STD)}


@dataclass(frozen=True)
class EncoderWeights:
    """The complete weights of an encoder."""

    weights: Weights
    """float32 on the CPU, by torchvision's names (ResNets) or timm's (ViTs), without a classifier."""
    arch: str
    """One of `models.backbones.ARCHITECTURES`, or a ViT with another patch size in its name."""
    provenance: dict[str, Any]
    """`source` (file name), `source_sha256`, `encoder` (`teacher`, `student`, `only` or `untrained`), `arch`, `method`
    and `epoch` if known, and the expected input: `color_order`, and `mean` and `std` of pixel values in [0, 1]."""


def load_encoder(path: Path | str, which: str | None = None, output_stride: int = 32) -> nn.Module:
    """Return the encoder of any checkpoint, frozen and in evaluation mode.

    It maps normalized RGB images (B, 3, H, W) to a feature map (B, width, H / stride, W / stride).

    Args:
        which: `teacher` or `student`; None for the teacher where the file has both.
        output_stride: pixels per position of a ResNet's map, below 32 by dilation; a ViT's stride is its patch size.

    Raises:
        UsageError: as `read_encoder`, or the architecture cannot have this output stride.
    """
    return build_frozen_encoder(read_encoder(path, which), output_stride)


def build_frozen_encoder(encoder: EncoderWeights, output_stride: int = 32) -> nn.Module:
    """Return `encoder` as a frozen network in evaluation mode, with `.width` and `.stride`."""
    with torch.device("meta"):
        network = build_encoder(encoder.arch, output_stride)
    network.load_state_dict(encoder.weights, assign=True)
    return network.eval().requires_grad_(False)


def untrained_encoder(arch: str, seed: int) -> EncoderWeights:
    """Return randomly initialized weights, as at the start of pre-training: the baseline of every probe."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_encoder(arch)
    checksum = hashlib.sha256(f"untrained {arch} {seed}".encode()).hexdigest()
    provenance = {"arch": arch, "encoder": "untrained", "source": f"random, seed {seed}", "source_sha256": checksum}
    return EncoderWeights(network.state_dict(), arch, _DEFAULT_INPUT | provenance)


def read_encoder(path: Path | str, which: str | None = None, flag: str = "checkpoint") -> EncoderWeights:
    """Read an encoder from a checkpoint of this project, a released one, a backbone's, or torchvision's or timm's.

    A file that transfer/convert.py wrote is read as well, in every format; the provenance stays that of its source.

    Args:
        which: `teacher` or `student`; None for the teacher where the file has both, else for the only encoder.
        flag: the flag or argument that names the file, which begins the messages.

    Raises:
        UsageError: the file is missing, damaged or holds code; it has no such encoder, or an incomplete one.
    """
    return extract_encoder(checkpoint.load(path, flag), path, which, flag)


def extract_encoder(
    state: Mapping[str, Any], path: Path | str, which: str | None = None, flag: str = "checkpoint"
) -> EncoderWeights:
    """Return the encoder in a loaded checkpoint.

    Args:
        path: the file that was loaded.
        which: as in `read_encoder`.
        flag: as in `read_encoder`.

    Raises:
        UsageError: there is no such encoder, or an incomplete one.
    """
    where = f"{flag} {path}"
    extracted = checkpoint.extract_weights(state, where)
    selected, weights = checkpoint.find_encoder(extracted, which or "teacher")
    if not weights:
        raise UsageError(
            f"{where}: no encoder in it (looked for encoder_k., encoder_q., momentum_encoder., base_encoder., "
            "encoder., backbone. and bare names of ResNets and ViTs)"
        )
    converted = read_provenance(state)
    selected = converted.get("encoder", selected) if selected == "only" else selected
    if which and selected != which:
        description = "neither teacher nor student" if selected == "only" else f"the {selected}"
        raise UsageError(f"{where}: no {which} in it, its only encoder is {description}; omit --encoder to use that")
    arch = infer_arch(weights, where)
    checkpoint.check_finite(weights, where)
    # Copies, because a tensor may be a view of a larger one, or shared.
    weights = {name: (value.float() if value.is_floating_point() else value).clone() for name, value in weights.items()}
    provenance = converted or _checkpoint_metadata(state) | {
        "encoder": selected,
        "source": Path(path).name,
        "source_sha256": _hash_file(Path(path)),
    }
    return EncoderWeights(weights, arch, _DEFAULT_INPUT | provenance | {"arch": arch})


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def infer_arch(weights: Weights, where: str) -> str:
    """Return the architecture whose tensors have exactly these names and shapes.

    Args:
        where: the file's name in error messages.

    Raises:
        UsageError: there is none; the message names the closest architecture and the first difference.
    """
    checkpoint.refuse_detectron2_vit(weights, where)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        arch = max(
            _candidate_architectures(shapes), key=lambda arch: len(_encoder_shapes(arch).items() & shapes.items())
        )
    except UsageError:
        raise UsageError(f"{where}: a ViT, which needs timm; pip install timm") from None
    if mismatch := checkpoint.first_mismatch(weights, _encoder_shapes(arch)):
        raise UsageError(f"{where}: not a complete {arch}, the closest known architecture ({mismatch})")
    return arch


def _candidate_architectures(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the ResNets, or the ViTs, with the patch size of these shapes if they have a valid one."""
    if not any(name.startswith(("patch_embed.", "blocks.")) for name in shapes):
        return RESNETS
    patch_size = (shapes.get("patch_embed.proj.weight") or (0,))[-1]
    if not 0 < patch_size <= 224:
        return VITS
    return tuple(dict.fromkeys(with_patch_size(arch, patch_size) for arch in VITS))


@cache
def _encoder_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_encoder(arch).state_dict().items()}


def read_provenance(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance in a converted file (JSON in `.safetensors`); {} if the file is not a converted one."""
    provenance = state.get(PROVENANCE)
    if isinstance(provenance, str):
        try:
            provenance = json.loads(provenance)
        except (ValueError, RecursionError):
            return {}
    if not isinstance(provenance, Mapping) or any(name not in provenance for name in _REQUIRED_PROVENANCE):
        return {}
    if "colour_order" in provenance:  # the key's name in files that were converted before it became American
        provenance = {**provenance, "color_order": provenance["colour_order"]}
    known = {name: provenance[name] for name in _PROVENANCE_CHECKS if name in provenance}
    return known if all(_PROVENANCE_CHECKS[name](value) for name, value in known.items()) else {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_finite_triple(values: Any) -> bool:
    """Return whether a value is a list of three finite numbers, one per color channel."""
    numbers = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
    return numbers and len(values) == 3 and all(abs(value) <= sys.float_info.max for value in values)


_REQUIRED_PROVENANCE = ("format", "source", "encoder", "source_sha256")
_PROVENANCE_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((*_REQUIRED_PROVENANCE, "arch", "method"), _is_text),
    "epoch": lambda value: isinstance(value, int) or _is_text(value),
    "color_order": lambda value: isinstance(value, str) and value in ("RGB", "BGR"),
    **dict.fromkeys(("mean", "std"), _is_finite_triple),
}
"""The keys of a provenance, and whether a value is valid for them."""


def _checkpoint_metadata(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method and the epoch of the run that wrote a checkpoint, as far as it has them."""
    metadata = {"method": checkpoint.checkpoint_args(state).get("method"), "epoch": state.get("epoch")}
    return {name: value for name, value in metadata.items() if _PROVENANCE_CHECKS[name](value)}
