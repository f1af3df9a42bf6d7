"""Checkpoints: written whole or not at all, read without running code."""

import argparse
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UsageError

Weights = dict[str, Tensor]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to a temporary name beside `path`, then rename, so that `path` is never half a file.

    Raises:
        UsageError: the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        reason = getattr(error, "strerror", None) or f"{free:.0f} MiB are free"
        raise UsageError(f"--output-dir: {path} cannot be written ({reason}); earlier checkpoints are whole") from None


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

    Raises:
        UsageError: naming `flag`, if the file is missing, truncated, or holds code (none of which runs).
    """
    if not Path(path).is_file():
        raise UsageError(f"{flag} {path}: no such file")
    try:
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
    state: Mapping[str, Any] = load(path, flag)
    for container in ("model", "state_dict"):
        if isinstance(state.get(container), Mapping):
            state = state[container]
    weights = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise UsageError(f"{flag} {path}: no weights in it")
    return weights


def initialise(method: nn.Module, path: Path | str) -> list[str]:
    """Start `method` from the weights in `path`: whole parts where the file has them, the encoder at least.

    An encoder alone (backbone-only, torchvision) goes to student and teacher. Prototypes and centre of another
    number K stay as they were initialised.

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
    """The weights of part `name`: under its name, its twin's (`_q` and `_k`), or in a file that is one encoder."""
    twin = name[:-2] + {"_q": "_k", "_k": "_q"}.get(name[-2:], name[-2:])
    prefixes = [f"{name}.", f"{twin}."]
    if name.startswith("encoder_"):
        prefixes += ["encoder.", "backbone.", *([""] if "conv1.weight" in weights else [])]
    for prefix in prefixes:
        part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        part = {key: value for key, value in part.items() if not key.startswith("fc.")}
        if part:
            return part
    return {}


def _other_number(part: Weights, module: nn.Module) -> bool:
    """Whether `part` holds prototypes, and not as many as `module`."""
    key = "slot_embed.weight"
    return key in part and len(part[key]) != len(module.state_dict()[key])


def load_strict(module: nn.Module, weights: Weights, where: str) -> None:
    """`module.load_state_dict(weights, strict=True)`, with the first misfit as a one-line error."""
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
