"""Read and write checkpoints, and find the parts of a model in them."""

import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from utils import safe_pickle
from utils.errors import UsageError
from utils.files import atomic_write
from utils.integrity import ADVICE, DamagedFileError, check_checksum
from utils.released_names import has_released_parts, rename_released
from utils.resnet_names import torchvision_name
from utils.vit_names import DETECTRON2_PREFIX, timm_vit_name

Weights = dict[str, Tensor]

_ENCODER_PREFIXES = {
    "teacher": ("encoder_k.",),
    "student": ("encoder_q.",),
    "only": ("encoder.", DETECTRON2_PREFIX, "backbone."),
}
"""The prefixes of an encoder's tensors."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        atomic_write(path, lambda file: torch.save(state, file))
    except OSError as error:
        reason = f"--output-dir: {path} cannot be written ({error.strerror}); earlier checkpoints are intact"
        raise UsageError(reason) from None


def load(path: Path | str, flag: str, advice: str = ADVICE) -> dict[str, Any]:
    """Return a checkpoint, on the CPU: tensors, numbers and strings in dicts, lists and tuples.

    A released file's `argparse.Namespace` becomes a dict; a `.safetensors` file gives its metadata and its tensors in
    one dict; the arrays of detectron2's `.pkl` become tensors.

    Args:
        flag: the flag or argument that names the file, which begins the messages.
        advice: what to do about a damaged file, which ends the messages.

    Raises:
        UsageError: naming `flag`, if the file is missing, or holds code (none of which runs).
        DamagedFileError: naming `flag`, if it is truncated, or a checksum in it is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{flag} {path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{flag} {path}: no permission to read it")
    if path.suffix == ".pkl" and not safe_pickle.is_torch_file(path):
        return _to_tensors(safe_pickle.load_arrays(path, flag))
    is_safetensors = path.suffix == ".safetensors"
    try:
        state = _load_safetensors(path) if is_safetensors else safe_pickle.load_torch(path)
    except DamagedFileError as error:
        raise DamagedFileError(f"{flag} {path}: damaged: {error}; {advice}") from None
    except pickle.UnpicklingError:
        raise UsageError(
            f"{flag} {path}: refused, it holds more than tensors and numbers, or is no checkpoint"
        ) from None
    except Exception:  # a damaged file raises errors of many types
        raise DamagedFileError(f"{flag} {path}: truncated or no checkpoint; {advice}") from None
    if not isinstance(state, dict):
        raise UsageError(f"{flag} {path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        state = {**(file.metadata() or {}), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    check_checksum(state)
    return state


def _to_tensors(content: Any) -> Any:
    """Replace the arrays in nested dicts by tensors."""
    if isinstance(content, dict):
        return {name: _to_tensors(value) for name, value in content.items()}
    return torch.from_numpy(content) if isinstance(content, np.ndarray) else content


def load_weights(path: Path | str, flag: str = "--init") -> Weights:
    """Return the weights in any checkpoint (ours, released, torchvision's), flat, without DDP's prefix `module.`.

    Raises:
        UsageError: as `load`, or if the file has no tensors.
    """
    return extract_weights(load(path, flag), f"{flag} {path}")


def extract_weights(state: Mapping[str, Any], where: str) -> Weights:
    """Return the tensors of a loaded checkpoint, of its entry `model` or `state_dict` where it has one.

    The parts of released checkpoints get the names that they have in this project.

    Args:
        where: the file, as messages name it.

    Raises:
        UsageError: there are no tensors.
    """
    return {rename_released(name): value for name, value in _extract_tensors(state, where).items()}


def _extract_tensors(state: Mapping[str, Any], where: str) -> Weights:
    """Return the tensors of a loaded checkpoint by the names in it, as `extract_weights` otherwise."""
    for container in ("model", "state_dict"):
        if isinstance(state.get(container), Mapping):
            state = state[container]
    weights = {
        name.removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor) and isinstance(name, str) and name.isprintable()
    }
    if not weights:
        raise UsageError(f"{where}: no weights in it")
    return weights


def checkpoint_args(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the run that wrote a checkpoint; {} if it has none."""
    args = state.get("args")
    return {name: value for name, value in args.items() if isinstance(name, str)} if isinstance(args, Mapping) else {}


def find_encoder(weights: Weights, prefer: str = "teacher") -> tuple[str, Weights]:
    """Find an encoder in `weights`; those of detectron2 and mmsegmentation get the names of torchvision or timm.

    Args:
        prefer: which one to return of a file that has both, `teacher` or `student`.

    Returns:
        Which one it is, `teacher`, `student`, or `only` where the file is a single encoder, and its weights without
        their prefix and without a classifier; both are empty if there is none.
    """
    weights = _rename_detectron2(weights) or _rename_mmseg_vit(weights) or weights
    bare = "conv1.weight" in weights or "patch_embed.proj.weight" in weights
    for which in sorted(_ENCODER_PREFIXES, key=lambda name: (name == "only", name != prefer)):
        for prefix in (*_ENCODER_PREFIXES[which], *([""] if which == "only" and bare else [])):
            part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            part = {name: value for name, value in part.items() if not name.startswith(("fc.", "head."))}
            if part:
                return which, _add_batch_counters(part)
    return "", {}


def _rename_detectron2(weights: Weights) -> Weights:
    """Return the ResNet of a backbone or a detector of detectron2 by torchvision's names; {} if there is none.

    A detector has it below `backbone.bottom_up.` (FPN) or `backbone.` (C4, with its last stage in `roi_heads.res5`).
    """
    for prefix in ("", "backbone.bottom_up.", "backbone."):
        if f"{prefix}stem.conv1.weight" in weights:
            matches = [re.match(rf"{re.escape(prefix)}|roi_heads\.(?=res5\.\d)", name) for name in weights]
            parts = zip(weights, matches, strict=True)
            return {torchvision_name(name[match.end() :]): weights[name] for name, match in parts if match}
    return {}


def _rename_mmseg_vit(weights: Weights) -> Weights:
    """Return the ViT of a backbone or a segmentor of mmsegmentation by timm's names; {} if there is none."""
    for prefix in ("", "backbone."):
        if f"{prefix}patch_embed.projection.weight" in weights:
            return {
                timm_vit_name(name.removeprefix(prefix)): value
                for name, value in weights.items()
                if name.startswith(prefix)
            }
    return {}


def _add_batch_counters(weights: Weights) -> Weights:
    """Add `num_batches_tracked` = 0 to batch norms without it, as files written before torch 0.4 have them."""
    means = [name for name in weights if name.endswith("running_mean")]
    counters = [name.replace("running_mean", "num_batches_tracked") for name in means]
    return {name: torch.zeros((), dtype=torch.int64) for name in counters if name not in weights} | weights


def refuse_detectron2_vit(weights: Weights, where: str) -> None:
    """Refuse an encoder that is a ViT of detectron2, which has neither class token nor final norm.

    Args:
        where: the file, as messages name it.

    Raises:
        UsageError: it is one.
    """
    if "patch_embed.proj.weight" in weights and not {"cls_token", "norm.weight"} & weights.keys():
        raise UsageError(
            f"{where}: a ViT of detectron2, without class token and final norm; "
            "use the checkpoint from which it was converted"
        )


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Check that all values are finite.

    Args:
        where: the file, as messages name it.

    Raises:
        UsageError: naming the first tensor with values that are not finite.
    """
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UsageError(f"{where}: {name} holds values that are not finite; use another checkpoint")


def first_mismatch(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor | tuple[int, ...]]) -> str:
    """Return the first difference in names and shapes as text; empty if there is none."""
    for name in sorted(weights.keys() | expected.keys()):
        if name not in weights:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} has no place in it"
        shape, required = tuple(weights[name].shape), expected[name]
        required = tuple(required.shape if isinstance(required, Tensor) else required)
        if shape != required:
            return _describe_shapes(name, shape, required)
    return ""


def _describe_shapes(name: str, shape: tuple[int, ...], required: tuple[int, ...]) -> str:
    """Return the difference of two shapes as text; that of a ViT's position embeddings as grids of patches."""
    if name == "pos_embed" and len(shape) == 3 and (shape[0], shape[2]) == (required[0], required[2]):
        side, required_side = (math.isqrt(max(number - 1, 0)) for number in (shape[1], required[1]))
        return f"{name} is for {side} x {side} patches and should be for {required_side} x {required_side}"
    return f"{name} is {shape} and should be {required}"


def initialize_from(method: nn.Module, path: Path | str) -> dict[str, str]:
    """Copy weights from `path` into `method`: the encoders, and every other part that the file has.

    A single encoder (backbone-only, torchvision's) goes to student and teacher. Prototypes and center keep their
    initial values where the file has another number K, and so do parts that do not fit in a released file of GTSA,
    whose heads are taken by their order, because their names may differ.

    Returns:
        The name of each part -> why it keeps its initial values, empty if it was copied.

    Raises:
        UsageError: the file has no encoder, or a part of it does not fit or has values that are not finite.
    """
    tensors = _extract_tensors(load(path, "--init"), f"--init {path}")
    weights = {rename_released(name): value for name, value in tensors.items()}
    released = has_released_parts(tensors)
    reasons = {}
    for name, module in method.named_children():
        if not (expected := module.state_dict()):
            continue
        part = _find_part(weights, name)
        if name.startswith("encoder_"):
            refuse_detectron2_vit(part, f"--init {path}")
        elif released:
            part = _rename_by_order(part, expected)
        can_skip = released and not name.startswith("encoder_")
        reasons[name] = _reason_to_skip(part, expected, can_skip)
        if not reasons[name]:
            load_strict(module, part, f"--init {path}: {name}")
            check_finite(part, f"--init {path}: {name}")
    if reasons["encoder_q"]:
        raise UsageError(f"--init {path}: no encoder in it (looked for encoder_q., encoder_k., bare ResNets and ViTs)")
    buffers = dict(method.named_buffers(recurse=False))
    for name in buffers.keys() & weights.keys():
        if buffers[name].shape == weights[name].shape and reasons.get("grouping_k") == "":
            buffers[name].copy_(weights[name])
            reasons[name] = ""
    return reasons


def _find_part(weights: Weights, name: str) -> Weights:
    """Return the weights of the part `name`, or of its counterpart (`_q` or `_k`) where the file has only that."""
    if name.startswith("encoder_"):
        return find_encoder(weights, "teacher" if name == "encoder_k" else "student")[1]
    counterpart = name[:-2] + {"_q": "_k", "_k": "_q"}.get(name[-2:], name[-2:])
    for prefix in (f"{name}.", f"{counterpart}."):
        part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if part:
            return part
    return {}


def _rename_by_order(part: Weights, expected: Weights) -> Weights:
    """Return the weights of a head by the names in `expected` if they have the same shapes in the same order.

    This identifies the tensors, because heads are sequential.
    """
    fits = [value.shape for value in part.values()] == [value.shape for value in expected.values()]
    return dict(zip(expected, part.values(), strict=True)) if fits and part.keys() != expected.keys() else part


def _reason_to_skip(part: Weights, expected: Weights, can_skip: bool) -> str:
    """Return why a part keeps its initial values; empty if it is copied.

    Args:
        can_skip: whether a part of other names or shapes keeps its initial values; otherwise only prototypes of
            another number do.
    """
    if not part:
        return "not in the file"
    if can_skip:
        return first_mismatch(part, expected)
    name = "slot_embed.weight"
    if name in part and name in expected and part[name].shape[1:] == expected[name].shape[1:]:
        return first_mismatch({name: part[name]}, {name: expected[name]})
    return ""


def load_strict(module: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    """Call `module.load_state_dict(weights, strict=True)`.

    Raises:
        UsageError: a name or shape differs; it names `where` and the first difference.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise UsageError(f"{where}: {name} is missing; use the same --arch and --method")
        if name not in expected:
            raise UsageError(f"{where}: {name} has no place in this model; use the same --arch and --method")
        if not isinstance(weights[name], Tensor):
            raise UsageError(f"{where}: {name} is not a tensor; is it a checkpoint?")
        if weights[name].shape != expected[name].shape:
            difference = _describe_shapes(name, tuple(weights[name].shape), tuple(expected[name].shape))
            advice = (
                "use weights for the image size in the name of --arch"
                if name == "pos_embed"
                else "pass its --arch and sizes"
            )
            raise UsageError(f"{where}: {difference}; {advice}")
    module.load_state_dict(weights, strict=True)
