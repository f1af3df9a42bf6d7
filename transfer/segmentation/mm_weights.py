"""Read and check the weights that train.py and test.py take, without running code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transfer.encoders import infer_arch, read_provenance
from utils import checkpoint
from utils.checkpoint import Weights
from utils.errors import UsageError

_CONVERT = "transfer/segmentation/convert_pretrain_to_mm.py"
_OTHER_FRAMEWORKS = {".pkl": "detectron2", ".safetensors": "safetensors"}


def read_pretrained(path: Path, cfg: Any) -> tuple[Weights, dict[str, Any]]:
    """Read a converted encoder, and check that it has exactly the tensors of the config's backbone.

    mmsegmentation itself only warns about tensors that do not match, and trains them from random values.

    Returns:
        The weights and their provenance.

    Raises:
        UsageError: the file is missing, damaged, not converted, incomplete or of another architecture, or has values
            that are not finite.
    """
    state = checkpoint.load(path, "PRETRAINED")
    weights = checkpoint.extract_weights(state, f"PRETRAINED {path}")
    expected = _shapes({**cfg.model.backbone, "init_cfg": None})
    encoder = checkpoint.find_encoder(weights)[1] or weights
    if mismatch := checkpoint.first_mismatch(encoder, expected):
        raise UsageError(f"PRETRAINED {path}: {_describe_mismatch(encoder, cfg.model.backbone, mismatch)}")
    convert = f"convert it with {_CONVERT} {path} OUT.pth"
    if path.suffix in _OTHER_FRAMEWORKS:
        raise UsageError(f"PRETRAINED {path}: is a {_OTHER_FRAMEWORKS[path.suffix]} file; {convert}")
    if "model" in state or checkpoint.first_mismatch(weights, expected):  # mmengine would not find all tensors
        raise UsageError(f"PRETRAINED {path}: its tensors are not named as mmsegmentation expects; {convert}")
    checkpoint.check_finite(weights, f"PRETRAINED {path}")
    return weights, read_provenance(state)


def _shapes(model: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a config's model on the meta device, which has shapes only."""
    from mmseg.registry import MODELS

    with torch.device("meta"):
        return MODELS.build(dict(model)).state_dict()


def _describe_mismatch(encoder: Weights, backbone: Any, mismatch: str) -> str:
    """Return what is wrong with weights that are not those of the config's backbone, and what to do."""
    name = f"{backbone.type}{backbone.get('depth', '')}"
    try:
        arch = infer_arch(encoder, "")
    except UsageError:
        return f"is not a complete {name}, the config's backbone ({mismatch}); make it with {_CONVERT}"
    return f"is a {arch}, and the config's backbone is {name} ({mismatch}); use weights of a {name}"


def read_fine_tuned(path: Path, flag: str) -> dict[str, Any]:
    """Read a checkpoint that mmengine wrote during fine-tuning.

    Args:
        flag: the argument that names the file, for messages.

    Returns:
        `state_dict`, the weights by the model's names, and `meta`, mmengine's description of the run.

    Raises:
        UsageError: the file is missing, damaged, holds code, is not mmengine's, or has values that are not finite.
    """
    state = checkpoint.load(path, flag)
    meta = state.get("meta")
    if "state_dict" not in state or not isinstance(meta, Mapping) or not isinstance(meta.get("iter"), int):
        raise UsageError(f"{flag} {path}: not a checkpoint of a fine-tuning, such as iter_30000.pth")
    weights = checkpoint.extract_weights(state, f"{flag} {path}")
    checkpoint.check_finite(weights, f"{flag} {path}")
    return {"state_dict": weights, "meta": meta}


def check_model(weights: Weights, cfg: Any, where: str) -> None:
    """Check that the weights of a fine-tuning are those of the config's model.

    Args:
        where: the file, as messages name it.

    Raises:
        UsageError: a name or shape differs.
    """
    if mismatch := checkpoint.first_mismatch(weights, _shapes(cfg.model)):
        raise UsageError(f"{where}: does not fit the config's model ({mismatch}); use the config that trained it")
