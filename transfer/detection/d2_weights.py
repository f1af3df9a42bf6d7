"""Read weights files without running code, and compare them with the tensors of a detectron2 model.

detectron2 itself unpickles any file, and only prints a warning about tensors that do not match.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer.encoders import read_encoder
from utils import checkpoint
from utils.errors import UsageError
from utils.safe_pickle import load_arrays
from utils.vit_names import DETECTRON2_PREFIX

RESNET_PREFIX = "backbone.bottom_up."
"""The prefix of a ResNet's tensors in a model with an FPN."""

_BACKBONES = (RESNET_PREFIX, DETECTRON2_PREFIX)

_IMAGE_SIZE = 224  # of the position embeddings of a ViT in detectron2
_CONVERT_COMMAND = "python transfer/detection/convert_pretrain_to_d2.py"
_BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

logging.getLogger("iopath").addHandler(logging.NullHandler())  # find_weights reports a failed download itself


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and how much of a model it has to hold."""

    flag: str
    """The command-line flag or config key that names the file, for messages."""
    path: Path
    full_model: bool
    """Whether the file has to hold a whole detector; otherwise its backbone."""


@dataclass(frozen=True)
class FileContents:
    """The contents of a weights file."""

    tensors: dict[str, Tensor]
    """By the names of the model, as far as detectron2's rules give them."""
    caffe2: bool = False
    """Whether Caffe2 wrote the file; such files have no batch-norm statistics."""


def find_weights(cfg: Any, resume: bool, eval_only: bool) -> WeightsFile:
    """Return the file that detectron2 will load: OUTPUT_DIR's last checkpoint, or MODEL.WEIGHTS, downloaded if remote.

    Raises:
        UsageError: there is none.
    """
    last = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    if resume and last.is_file():
        return WeightsFile("--resume", last.parent / last.read_text().strip(), full_model=True)
    name = cfg.MODEL.WEIGHTS
    if not name and eval_only:
        raise UsageError("MODEL.WEIGHTS is empty; add MODEL.WEIGHTS and a detector, such as a run's model_final.pth")
    if not name:
        raise UsageError(f"MODEL.WEIGHTS is empty; {_CONVERT_COMMAND} IN.pth OUT.pkl, then add MODEL.WEIGHTS OUT.pkl")
    if "://" in name:
        name = _download(name)
    return WeightsFile("MODEL.WEIGHTS", Path(name), full_model=eval_only)


def _download(url: str) -> str:
    from detectron2.utils.file_io import PathManager

    try:
        return PathManager.get_local_path(url)
    except Exception as error:  # each protocol raises its own errors
        reason = str(error).splitlines()[0]
        raise UsageError(f"MODEL.WEIGHTS {url}: cannot be downloaded ({reason}); give the path of a file") from None


def read_weights(file: WeightsFile) -> FileContents:
    """Read the tensors of a file under the model's names, by the rules that detectron2 applies.

    Raises:
        UsageError: the file is missing, truncated, or holds code (none of which runs).
    """
    where = f"{file.flag} {file.path}"
    is_pickle = file.path.suffix == ".pkl"
    state = load_arrays(file.path, file.flag) if is_pickle else checkpoint.load(file.path, file.flag)
    weights = next((state[key] for key in ("model", "state_dict", "blobs") if key in state), state)
    if not isinstance(weights, Mapping):
        raise UsageError(f"{where}: no weights in it")
    weights = {name: _to_tensor(value) for name, value in weights.items() if _is_weight(name, value)}
    caffe2 = is_pickle and ("model" not in state or state.get("__author__") == "Caffe2")
    if caffe2:
        weights = _rename_caffe2(weights)
    if caffe2 or state.get("matching_heuristics"):
        backbone_prefixes = ("stem.", "res")
        weights = {
            f"{RESNET_PREFIX}{name}" if name.startswith(backbone_prefixes) else name: weights[name] for name in weights
        }
    return FileContents(weights, caffe2)


def has_mask_head(file: WeightsFile) -> bool:
    """Return whether a file holds a detector with a mask head.

    Raises:
        UsageError: as `read_weights`.
    """
    return any(name.startswith("roi_heads.mask_head.") for name in read_weights(file).tensors)


def _is_weight(name: Any, value: Any) -> bool:
    """Return whether an entry of a file is a tensor of the network; Caffe2's files also hold the optimizer's."""
    is_numeric = isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")
    return isinstance(name, str) and is_numeric and not name.endswith("_momentum")


def _to_tensor(value: np.ndarray | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(value.copy())  # an unpickled array may be read-only


def _rename_caffe2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names

    return convert_c2_detectron_names(weights)[0]


def check_weights(file: WeightsFile, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compare a file with a model.

    Args:
        model: the model's state; it may be on the meta device, since only names and shapes are compared.

    Returns:
        The tensors that the model must have after loading, by the model's names.

    Raises:
        UsageError: the file cannot be read; one of these tensors is missing, has another shape or is not finite; or
            the file has layers that the model does not have.
    """
    contents, where = read_weights(file), f"{file.flag} {file.path}"
    required = [name for name in model if _is_required(name, file, contents)]
    if not any(name.startswith(_BACKBONES) for name in required):
        raise UsageError(
            "--config-file: its model has no ResNet or ViT with an FPN; use one of transfer/detection/configs"
        )
    incomplete = other = "give a detector of this config, such as its run's model_final.pth"
    if not file.full_model:
        network = _check_network(file, contents, model)
        incomplete = f"the file is incomplete; make it again with {_CONVERT_COMMAND} CHECKPOINT OUT.pkl"
        other = f"the file holds another network; give weights of a {network}"
    for name in required:
        if name not in contents.tensors:
            raise UsageError(f"{where}: {name} is missing; {incomplete}")
        shape, model_shape = tuple(contents.tensors[name].shape), tuple(model[name].shape)
        if shape != model_shape and name == f"{DETECTRON2_PREFIX}pos_embed" and not file.full_model:
            raise UsageError(f"{where}: {name} is for another image size; use an encoder for {_IMAGE_SIZE} px")
        if shape != model_shape:
            raise UsageError(f"{where}: {name} has shape {shape} and the config's model {model_shape}; {other}")
        if not contents.tensors[name].isfinite().all():
            raise UsageError(f"{where}: {name} is not finite; use an earlier checkpoint")
    for name in sorted(contents.tensors.keys() - model.keys()):
        if name.startswith(_BACKBONES) and ".fc." not in name:
            raise UsageError(f"{where}: {name} does not exist in the config's model; {other}")
    return {name: contents.tensors[name] for name in required}


def _check_network(file: WeightsFile, contents: FileContents, model: Mapping[str, Tensor]) -> str:
    """Check that a file holds the network that is the model's backbone, and that it is converted. Return the network.

    Raises:
        UsageError: the file holds another network, or it is not converted, or it cannot be converted.
    """
    where = f"{file.flag} {file.path}"
    required = _describe_network({name: value for name, value in model.items() if name.startswith(_BACKBONES)})
    network = _describe_network(contents.tensors)
    if not network:
        raise UsageError(f"{where}: no ResNet or ViT in it; make a file with {_CONVERT_COMMAND} CHECKPOINT OUT.pkl")
    if network != required:
        raise UsageError(
            f"{where}: holds a {network}, and the config is for a {required}; use weights and config of one network"
        )
    if not any(name.startswith(_BACKBONES) for name in contents.tensors):
        try:
            read_encoder(file.path)
        except UsageError as error:
            raise UsageError(f"{file.flag} {str(error).removeprefix('checkpoint ')}") from None
        output = f"{file.path.stem}{'_d2' if file.path.suffix == '.pkl' else ''}.pkl"
        raise UsageError(
            f"{where}: not converted; {_CONVERT_COMMAND} {file.path} {output}, then MODEL.WEIGHTS {output}"
        )
    return required


def _describe_network(tensors: Mapping[str, Tensor]) -> str:
    """Return the kind and size of a ResNet or a ViT by its tensors, for example `ResNet-50`; empty for another network.

    The names may have any prefix, and the names of a ViT may be timm's or mmsegmentation's.
    """
    for name, value in tensors.items():
        patches = re.fullmatch(r"(.*\.)?patch_embed\.proj(?:ection)?\.weight", name)
        if patches and value.ndim == 4:
            block = re.compile(rf"{re.escape(patches[1] or '')}(?:blocks|layers)\.\d+\.")
            depth = len({match[0] for match in map(block.match, tensors) if match})
            return f"ViT ({depth} blocks, {value.shape[0]} channels, patch size {value.shape[-1]})"
    text = " ".join(tensors)
    blocks = set(re.findall(r"\b(?:layer|res)[1-5]\.\d+\.", text))
    convolutions = 3 if re.search(r"\b(?:layer|res)[1-5]\.\d+\.conv3\.", text) else 2
    return f"ResNet-{2 + convolutions * len(blocks)}" if blocks else ""


def _is_required(name: str, file: WeightsFile, contents: FileContents) -> bool:
    """Return whether the model's tensor `name` has to come from the file."""
    if file.full_model:  # not all of detectron2's own files have this counter, and nothing depends on it
        return name in contents.tensors or not name.endswith("num_batches_tracked")
    return name.startswith(_BACKBONES) and not (contents.caffe2 and name.endswith(_BATCH_STATISTICS))


def check_loaded(file: WeightsFile, model: Mapping[str, Tensor]) -> str:
    """Check that a model has the tensors of the file after detectron2 has loaded it, and return a line for the log.

    Raises:
        UsageError: as `check_weights`, or detectron2 did not load a tensor.
    """
    expected = check_weights(file, model)
    for name, value in expected.items():
        if not torch.equal(model[name].cpu(), value.to(model[name].dtype)):
            raise UsageError(f"{file.flag} {file.path}: detectron2 did not load {name}")
    kind = "" if file.full_model else "backbone "
    total = sum(file.full_model or name.startswith(_BACKBONES) for name in model)
    return f"{len(expected)} of {total} {kind}tensors from {file.path}"
