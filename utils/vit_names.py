"""The names of a ViT's tensors in timm, mmsegmentation and detectron2."""

import re

DETECTRON2_PREFIX = "backbone.net."
"""The prefix of a ViT's tensors in a detector of detectron2, whose names are timm's otherwise."""

_TIMM_TO_MMSEG = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^norm\.", "ln1."),
    (r"^blocks\.", "layers."),
    (r"\.norm(\d)\.", r".ln\1."),
    (r"\.attn\.qkv\.", ".attn.attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.attn.out_proj."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)
_MMSEG_TO_TIMM = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.ln(\d)\.", r".norm\1."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)


def mmseg_vit_name(name: str) -> str:
    """Map timm's name of a ViT's tensor to that of mmsegmentation's `VisionTransformer` with `final_norm=True`.

    `blocks.0.norm1.bias` -> `layers.0.ln1.bias`, `blocks.0.attn.qkv.weight` -> `layers.0.attn.attn.in_proj_weight`,
    `norm.weight` -> `ln1.weight`.
    """
    for pattern, replacement in _TIMM_TO_MMSEG:
        name = re.sub(pattern, replacement, name)
    return name


def timm_vit_name(name: str) -> str:
    """Map mmsegmentation's name of a ViT's tensor to timm's; the inverse of `mmseg_vit_name`."""
    for pattern, replacement in _MMSEG_TO_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


def detectron2_vit_name(name: str) -> str | None:
    """Map timm's name of a ViT's tensor to detectron2's; None for class token and final norm, which it does not have.

    The position embeddings keep that of the class token, as detectron2's `ViT` with `pretrain_use_cls_token` expects.
    """
    return None if name.startswith(("cls_token", "norm.")) else f"{DETECTRON2_PREFIX}{name}"
