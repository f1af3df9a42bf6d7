"""Checkpoints: written whole or not at all, read without running code."""

import argparse
import errno
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor, nn

from utils.errors import UsageError

Weights = dict[str, Tensor]

_ENCODERS = {
    "teacher": ("encoder_k.", "momentum_encoder."),
    "student": ("encoder_q.", "base_encoder."),
    "only": ("encoder.", "backbone."),
}
"""Where files keep an encoder: the names of SlotCon's and SlotFA's files, then those of GTSA's."""


def save(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint, whole or not at all.

    Raises:
        UsageError: the disk does not take it.
    """
    try:
        write_whole(path, lambda file: torch.save(state, file))
    except OSError as error:
        reason = f"--output-dir: {path} cannot be written ({error.strerror}); earlier checkpoints are whole"
        raise UsageError(reason) from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write` to a temporary name beside `path`, then rename, so that `path` is never half a file.

    Raises:
        OSError: the disk does not take it; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
        raise OSError(errno.EIO, getattr(error, "strerror", None) or f"{free:.0f} MiB are free") from None


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all.

    Raises:
        OSError: as `write_whole`.
    """
    write_whole(path, lambda file: file.write(text.encode()))


def point_to(link: Path, target: Path) -> None:
    """Make `link` the same file as `target`: a hard link, or a copy where the disk has none."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:
        shutil.copyfile(target, temporary)
    temporary.replace(link)


def load(path: Path | str, flag: str) -> dict[str, Any]:
    """Any checkpoint as it was saved, on the CPU: tensors, numbers, dicts, and the released files' Namespace.

    A `.safetensors` file gives its tensors, and beside them its metadata.

    Raises:
        UsageError: naming `flag`, if the file is missing, truncated, or holds code (none of which runs).
    """
    if not Path(path).is_file():
        raise UsageError(f"{flag} {path}: {'is a folder' if Path(path).is_dir() else 'no such file'}")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{flag} {path}: may not be read; change its permissions")
    try:
        if Path(path).suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return {**(file.metadata() or {}), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{flag} {path}: refused, it holds more than tensors and numbers, or is no checkpoint"
        ) from None
    except Exception:  # a damaged archive raises whatever its reader stumbles over
        raise UsageError(
            f"{flag} {path}: truncated or no checkpoint; use another, such as an earlier epoch's"
        ) from None
    if not isinstance(state, Mapping):
        raise UsageError(f"{flag} {path}: holds a {type(state).__name__}, not a checkpoint")
    return dict(state)


def load_weights(path: Path | str, flag: str = "--init") -> Weights:
    """The weights in any checkpoint (ours, released, torchvision), flat, without the `module.` of DDP.

    Raises:
        UsageError: as `load`, or if there are no tensors in it.
    """
    return weights_in(load(path, flag), f"{flag} {path}")


def weights_in(state: Mapping[str, Any], where: str) -> Weights:
    """The weights in a loaded checkpoint: those under `model` or `state_dict` if it has such a part.

    Raises:
        UsageError: naming `where`, if there are no tensors in it.
    """
    for container in ("model", "state_dict"):
        if isinstance(state.get(container), Mapping):
            state = state[container]
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    weights = {name.removeprefix("module."): value for name, value in tensors.items()}
    if not weights:
        raise UsageError(f"{where}: no weights in it")
    return weights


def find_encoder(weights: Weights, first: str = "teacher") -> tuple[str, Weights]:
    """The encoder in `weights`, without its prefix and without a classifier.

    Args:
        first: which to take of a file that holds both, `teacher` or `student`.

    Returns:
        Which it is, `teacher`, `student`, or `only` of a file that is one encoder, and its weights; both empty if
        there is none.
    """
    bare = "conv1.weight" in weights or "patch_embed.proj.weight" in weights
    for which in sorted(_ENCODERS, key=lambda name: (name == "only", name != first)):
        for prefix in (*_ENCODERS[which], *([""] if which == "only" and bare else [])):
            part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            part = {name: value for name, value in part.items() if not name.startswith(("fc.", "head."))}
            if part:
                return which, _with_counters(part)
    return "", {}


def _with_counters(part: Weights) -> Weights:
    """`part` with the batch counters that batch norms in files of before torch 0.4 do not have."""
    counters = [name.replace("running_mean", "num_batches_tracked") for name in part if name.endswith("running_mean")]
    return {name: torch.zeros((), dtype=torch.int64) for name in counters if name not in part} | part


def initialize(method: nn.Module, path: Path | str) -> list[str]:
    """Start `method` from the weights in `path`: whole parts where the file has them, the encoder at least.

    An encoder alone (backbone-only, torchvision) goes to student and teacher. Prototypes and center of another
    number K stay as they were initialized.

    Returns:
        The names of the parts that were taken over.

    Raises:
        UsageError: the file has no encoder, or a part of it does not fit.
    """
    weights = load_weights(path)
    taken = []
    for name, module in method.named_children():
        part = _find_part(weights, name)
        if part and not _other_number(part, module):
            load_strict(module, part, f"--init {path}: {name}")
            taken.append(name)
    if "encoder_q" not in taken:
        raise UsageError(f"--init {path}: no encoder in it (looked for encoder_q., encoder_k. and bare ResNet names)")
    buffers = dict(method.named_buffers(recurse=False))
    for name in buffers.keys() & weights.keys():
        if buffers[name].shape == weights[name].shape and "grouping_k" in taken:
            buffers[name].copy_(weights[name])
            taken.append(name)
    return taken


def _find_part(weights: Weights, name: str) -> Weights:
    """The weights of part `name`, under its name or its twin's (`_q` and `_k`); an encoder wherever it is."""
    if name.startswith("encoder_"):
        return find_encoder(weights, "teacher" if name == "encoder_k" else "student")[1]
    twin = name[:-2] + {"_q": "_k", "_k": "_q"}.get(name[-2:], name[-2:])
    for prefix in (f"{name}.", f"{twin}."):
        part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if part:
            return part
    return {}


def _other_number(part: Weights, module: nn.Module) -> bool:
    """Whether `part` holds prototypes, and not as many as `module`."""
    key = "slot_embed.weight"
    return key in part and len(part[key]) != len(module.state_dict()[key])


def load_strict(module: nn.Module, weights: Weights, where: str) -> None:
    """`module.load_state_dict(weights, strict=True)`, with the first first_mismatch as a one-line error."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise UsageError(f"{where}: {name} is missing; is it of the same --arch and --method?")
        if name not in expected:
            raise UsageError(f"{where}: {name} has no place in this model; is it of the same --arch and --method?")
        if not isinstance(weights[name], Tensor):
            raise UsageError(f"{where}: {name} is no tensor; is it a checkpoint?")
        if weights[name].shape != expected[name].shape:
            there, here = tuple(weights[name].shape), tuple(expected[name].shape)
            raise UsageError(f"{where}: {name} is {there} there and {here} here; pass the --arch and sizes it has")
    module.load_state_dict(weights, strict=True)
