"""Weights files before and after detectron2 has them: read without running code, and compared with the model's tensors.

detectron2 itself unpickles whatever it is given, and where tensors do not match it prints so and trains without them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import Tensor

from utils.safe_pickle import load_arrays
from utils import checkpoint
from utils.errors import UsageError

BACKBONE = "backbone.bottom_up."
CONVERT = "python transfer/detection/convert_pretrain_to_d2.py"
CONVERTED = f"as {CONVERT} IN.pth OUT.pkl writes them"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

logging.getLogger("iopath").addHandler(logging.NullHandler())  # a failed download is told once, by find_source


@dataclass(frozen=True)
class Source:
    """A file, and what of a model has to be in it."""

    flag: str
    """The flag or key that names it, for messages."""
    path: Path
    whole: bool
    """Whether it has to hold a whole detector, or its backbone alone."""


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    tensors: dict[str, Tensor]
    """By the model's names, as far as they are known."""
    caffe2: bool = False
    """Whether it is one of Caffe2's, which have no batch-norm statistics."""
    provenance: Mapping[str, Any] = field(default_factory=dict)


def find_source(cfg: CfgNode, resume: bool, eval_only: bool) -> Source:
    """The file that detectron2 is going to load: OUTPUT_DIR's last checkpoint, or MODEL.WEIGHTS, fetched if remote.

    Raises:
        UsageError: there is none.
    """
    last = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    if resume and last.is_file():
        return Source("--resume", last.parent / last.read_text().strip(), whole=True)
    name = cfg.MODEL.WEIGHTS
    if not name and eval_only:
        raise UsageError("MODEL.WEIGHTS is empty; append MODEL.WEIGHTS and a detector, such as a run's model_final.pth")
    if not name:
        raise UsageError(f"MODEL.WEIGHTS is empty; {CONVERT} IN.pth OUT.pkl, then append MODEL.WEIGHTS OUT.pkl")
    if "://" in name:
        try:
            name = PathManager.get_local_path(name)
        except Exception as error:  # every protocol has its own
            reason = str(error).splitlines()[0]
            raise UsageError(f"MODEL.WEIGHTS {name}: cannot be fetched ({reason}); append a file's path") from None
    return Source("MODEL.WEIGHTS", Path(name), whole=eval_only)


def read(source: Source) -> Contents:
    """A file's tensors under the model's names, with the rules by which detectron2 finds them.

    Raises:
        UsageError: it is missing, truncated, holds code (none of which runs), or was not converted.
    """
    where = f"{source.flag} {source.path}"
    pickled = source.path.suffix == ".pkl"
    state = load_arrays(source.path, source.flag) if pickled else checkpoint.load(source.path, source.flag)
    weights = next((state[name] for name in ("model", "state_dict", "blobs") if name in state), state)
    if not isinstance(weights, Mapping):
        raise UsageError(f"{where}: no weights in it")
    weights = {name: _tensor(value) for name, value in weights.items() if _is_weight(name, value)}
    if any(name.endswith("layer1.0.conv1.weight") for name in weights):
        output = source.path.with_suffix(".pkl").name
        raise UsageError(f"{where}: not converted; {CONVERT} {source.path} {output}, then MODEL.WEIGHTS {output}")
    caffe2 = pickled and ("model" not in state or state.get("__author__") == "Caffe2")
    if caffe2:
        weights, _ = convert_c2_detectron_names(weights)
    if caffe2 or state.get("matching_heuristics"):
        weights = {BACKBONE * name.startswith(("stem.", "res")) + name: value for name, value in weights.items()}
    provenance = state.get("provenance")
    return Contents(weights, caffe2, provenance if isinstance(provenance, Mapping) else {})


def _is_weight(name: Any, value: Any) -> bool:
    """Whether an entry of a file is a tensor of the network; Caffe2's files hold the optimizer's as well."""
    numbers = isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")
    return isinstance(name, str) and numbers and not name.endswith("_momentum")


def _tensor(value: np.ndarray | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value.copy())  # a pickle's may be read-only


def check(source: Source, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compare a file with a model's state, of which shapes suffice (the meta device).

    Returns:
        The tensors that the model has to have after loading, by the model's names.

    Raises:
        UsageError: as `read`, or one of these tensors is missing, of another shape or not finite, or the file has
            layers that the model has not.
    """
    contents, where = read(source), f"{source.flag} {source.path}"
    required = [name for name in model if _is_required(name, source, contents)]
    cure = "give a whole detector of this config, such as its run's model_final.pth"
    if not source.whole:
        arch = contents.provenance.get("arch")
        cure = f"give weights of the config's architecture{f'; these are of a {arch}' if arch else f', {CONVERTED}'}"
    if not any(name.startswith(BACKBONE) for name in required):
        raise UsageError("--config-file: its model has no ResNet below an FPN; use one of transfer/detection/configs")
    for name in required:
        if name not in contents.tensors:
            raise UsageError(f"{where}: {name} is missing; {cure}")
        there, here = tuple(contents.tensors[name].shape), tuple(model[name].shape)
        if there != here:
            raise UsageError(f"{where}: {name} is {there} there and {here} in the config's model; {cure}")
        if not contents.tensors[name].isfinite().all():
            raise UsageError(f"{where}: {name} is not finite; use an earlier epoch's")
    for name in sorted(contents.tensors.keys() - model.keys()):
        if name.startswith(BACKBONE) and ".fc." not in name:
            raise UsageError(f"{where}: {name} has no place in the config's model; {cure}")
    return {name: contents.tensors[name] for name in required}


def _is_required(name: str, source: Source, contents: Contents) -> bool:
    """Whether the model's tensor `name` has to come from the file."""
    if source.whole:  # the counter is not in all of detectron2's own files, and nothing depends on it
        return name in contents.tensors or not name.endswith("num_batches_tracked")
    return name.startswith(BACKBONE) and not (contents.caffe2 and name.endswith(STATISTICS))


def taken_over(source: Source, model: Mapping[str, Tensor]) -> str:
    """Make sure, by value, that a loaded model has what the file holds; returns a line that says so.

    Raises:
        UsageError: as `check`, or detectron2 left a tensor out.
    """
    expected = check(source, model)
    for name, value in expected.items():
        if not torch.equal(model[name].cpu(), value.to(model[name].dtype)):
            raise UsageError(f"{source.flag} {source.path}: detectron2 did not take over {name}")
    of_what = "" if source.whole else "backbone "
    every = sum(name.startswith(BACKBONE) or source.whole for name in model)
    return f"{len(expected)} of {every} {of_what}tensors from {source.path}"
