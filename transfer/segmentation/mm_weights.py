"""Read and check the weights that train.py and test.py take, without running code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.backbones import build_encoder, is_vit
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
    where = f"PRETRAINED {path}"
    weights = checkpoint.extract_weights(state, where)
    expected = _shapes({**cfg.model.backbone, "init_cfg": None})
    # Both by the names of torchvision or timm, so that a file with the right tensors is recognized by any names.
    encoder, network = (checkpoint.find_encoder(tensors)[1] or tensors for tensors in (weights, expected))
    checkpoint.refuse_detectron2_vit(encoder, where)
    if mismatch := checkpoint.first_mismatch(encoder, network):
        raise UsageError(f"{where}: {_describe_mismatch(encoder, network, cfg.model.backbone, mismatch)}")
    convert = f"convert it with {_CONVERT} {path} OUT.pth"
    if path.suffix in _OTHER_FRAMEWORKS:
        raise UsageError(f"{where}: is a {_OTHER_FRAMEWORKS[path.suffix]} file; {convert}")
    if "model" in state or checkpoint.first_mismatch(weights, expected):  # mmengine would not find all tensors
        raise UsageError(f"{where}: its tensors are not named as mmsegmentation expects; {convert}")
    checkpoint.check_finite(weights, where)
    _check_heads(network, cfg.model.backbone)
    return weights, read_provenance(state)


def _shapes(model: Mapping[str, Any]) -> Weights:
    """Return the tensors of a config's model or backbone, of which only names and shapes are used.

    Raises:
        UsageError: the model cannot be built.
    """
    from mmseg.registry import MODELS

    is_vit_config = "patch_size" in model.get("backbone", model)
    try:
        with torch.device("cpu" if is_vit_config else "meta"):  # mmsegmentation cannot build a ViT on the meta device
            return MODELS.build(dict(model)).state_dict()
    except Exception as error:  # the constructors raise errors of many types
        raise UsageError(f"CONFIG: the model cannot be built ({' '.join(str(error).split())})") from None


def _describe_mismatch(encoder: Weights, network: Weights, backbone: Any, mismatch: str) -> str:
    """Return what is wrong with weights that are not those of the config's backbone, and what to do.

    Args:
        encoder: the weights, by torchvision's or timm's names where they are an encoder's.
        network: the tensors of the backbone, named likewise.
        mismatch: the first difference.
    """
    name = _find_arch(network) if "depth" not in backbone else f"{backbone.type}{backbone.depth}"
    name = name or backbone.type
    if arch := _find_arch(encoder):
        return f"is a {arch}, and the config's backbone is {name} ({mismatch}); use weights of a {name}"
    return f"is not a complete {name}, the config's backbone ({mismatch}); make it with {_CONVERT}"


def _find_arch(tensors: Weights) -> str:
    """Return the architecture that has exactly these tensors, or an empty string if none is known."""
    try:
        return infer_arch(tensors, "")
    except UsageError:
        return ""


def _check_heads(network: Weights, backbone: Any) -> None:
    """Check the number of attention heads of a known ViT, which the shapes of its tensors do not show.

    Raises:
        UsageError: the config's backbone has another number.
    """
    arch = _find_arch(network)
    if not is_vit(arch):
        return
    with torch.device("meta"):
        blocks: Any = build_encoder(arch).blocks
    heads = blocks[0].attn.num_heads
    if backbone.get("num_heads") != heads:
        raise UsageError(f"model.backbone.num_heads={backbone.get('num_heads')}: a {arch} has {heads}; use {heads}")


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
