"""Read and check the weights that train.py and test.py take, without running code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transfer.encoders import read_provenance
from utils import checkpoint
from utils.checkpoint import Weights
from utils.errors import UsageError

_CONVERT_ADVICE = "convert a checkpoint with transfer/segmentation/convert_pretrain_to_mm.py IN.pth OUT.pth"


def read_pretrained(path: Path, cfg: Any) -> tuple[Weights, dict[str, Any]]:
    """Read a converted encoder, and check that it has exactly the tensors of the config's backbone.

    mmsegmentation itself only warns about tensors that do not match, and trains them from random values.

    Returns:
        The weights and their provenance.

    Raises:
        UsageError: the file is missing, damaged, not converted or of another architecture.
    """
    from mmseg.registry import MODELS

    if path.suffix == ".pkl":
        raise UsageError(f"PRETRAINED {path}: is for detectron2; {_CONVERT_ADVICE}")
    state = checkpoint.load(path, "PRETRAINED")
    weights = checkpoint.extract_weights(state, f"PRETRAINED {path}")
    if "conv1.weight" not in weights and checkpoint.find_encoder(weights)[0]:
        raise UsageError(f"PRETRAINED {path}: is not converted; {_CONVERT_ADVICE}")
    with torch.device("meta"):
        backbone = MODELS.build({**cfg.model.backbone, "init_cfg": None})
    if mismatch := checkpoint.first_mismatch(weights, backbone.state_dict()):
        name = f"{cfg.model.backbone.type}{cfg.model.backbone.get('depth', '')}"
        raise UsageError(
            f"PRETRAINED {path}: does not fit the config's backbone {name} ({mismatch}); {_CONVERT_ADVICE}"
        )
    return weights, read_provenance(state)


def read_fine_tuned(path: Path, flag: str) -> dict[str, Any]:
    """Read a checkpoint that mmengine wrote during fine-tuning.

    Args:
        flag: the argument that names the file, for messages.

    Returns:
        `state_dict`, the weights by the model's names, and `meta`, mmengine's description of the run.

    Raises:
        UsageError: the file is missing, damaged, holds code, or is not mmengine's.
    """
    state = checkpoint.load(path, flag)
    meta = state.get("meta")
    if "state_dict" not in state or not isinstance(meta, Mapping) or not isinstance(meta.get("iter"), int):
        raise UsageError(f"{flag} {path}: not a checkpoint of a fine-tuning, such as iter_30000.pth")
    return {"state_dict": checkpoint.extract_weights(state, f"{flag} {path}"), "meta": meta}
