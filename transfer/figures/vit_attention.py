"""Compute the attention of a ViT's class token to the patches."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class EncodedImages(NamedTuple):
    """The outputs of an encoder for B images."""

    features: Tensor
    """(B, C, h, w)."""
    attention: Tensor | None
    """(B, heads, h, w); None for encoders without a class token."""


def has_class_token(encoder: nn.Module) -> bool:
    """Return whether an encoder is a ViT with a class token."""
    return getattr(encoder, "cls_token", None) is not None


def encode(encoder: Any, images: Tensor) -> EncodedImages:
    """Encode normalized images (B, 3, H, W), and compute the attention of the class token in the last block of a ViT.

    timm's attention does not return its weights, and its fused kernels never hold them. A hook records queries and
    keys, from which the weights of the class token are computed once more: softmax(q k^T scale), over all tokens. The
    weights of the patches therefore sum to 1 minus the weight of the class token itself.
    """
    if not has_class_token(encoder):
        return EncodedImages(encoder(images), None)
    layer, recorded = encoder.blocks[-1].attn, []
    hook = layer.qkv.register_forward_hook(lambda _module, _inputs, output: recorded.append(output))
    try:
        features = encoder(images)
    finally:
        hook.remove()
    queries, keys, _ = recorded[0].unflatten(2, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    queries, keys = layer.q_norm(queries[:, :, :1]), layer.k_norm(keys)
    weights = (layer.scale * queries @ keys.transpose(2, 3)).float().softmax(dim=3)[:, :, 0]
    return EncodedImages(features, weights[:, :, encoder.num_prefix_tokens :].unflatten(2, features.shape[2:]))
