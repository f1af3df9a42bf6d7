"""The names of a ViT's tensors in timm, mmsegmentation and detectron2."""

from collections.abc import Iterable

DETECTRON2_PREFIX = "backbone.net."
"""The prefix of a ViT's tensors in a detector of detectron2, whose names are timm's otherwise."""

_TIMM_AND_MMSEG = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("norm.", "ln1."),
    ("blocks.", "layers."),
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    (".attn.qkv.", ".attn.attn.in_proj_"),
    (".attn.proj.", ".attn.attn.out_proj."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
)
"""Parts of names in timm and in mmsegmentation: those with a dot in front inside of a name, others at its start."""


def mmseg_vit_name(name: str) -> str:
    """Map timm's name of a ViT's tensor to that of mmsegmentation's `VisionTransformer` with `final_norm=True`.

    `blocks.0.norm1.bias` -> `layers.0.ln1.bias`, `blocks.0.attn.qkv.weight` -> `layers.0.attn.attn.in_proj_weight`,
    `norm.weight` -> `ln1.weight`.
    """
    return _replace_parts(name, _TIMM_AND_MMSEG)


def timm_vit_name(name: str) -> str:
    """Map mmsegmentation's name of a ViT's tensor to timm's; the inverse of `mmseg_vit_name`."""
    return _replace_parts(name, ((mmseg, timm) for timm, mmseg in _TIMM_AND_MMSEG))


def _replace_parts(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = f"{new}{name.removeprefix(old)}"
    return name


def detectron2_vit_name(name: str) -> str | None:
    """Map timm's name of a ViT's tensor to detectron2's; None for class token and final norm, which it does not have.

    The position embeddings keep that of the class token, as detectron2's `ViT` with `pretrain_use_cls_token` expects.
    """
    return None if name.startswith(("cls_token", "norm.")) else f"{DETECTRON2_PREFIX}{name}"
