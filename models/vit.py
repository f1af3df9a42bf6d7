"""timm's vision transformers as dense encoders."""

from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.backbones import Encoder
from utils.errors import UsageError


class ViTEncoder(VisionTransformer, Encoder):
    """A ViT that returns its patch tokens as a map, for images whose sides are multiples of the patch size."""

    def check_image_size(self, size: int) -> None:
        """Check that the patches divide square images of `size` pixels.

        Raises:
            UsageError: they do not.
        """
        if size % self.stride:
            raise UsageError(f"--image-size {size}: not a multiple of the patch size {self.stride}; use one")

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Map images (B, 3, H, W) to (B, width, H / stride, W / stride)."""
        tokens = self.forward_features(images)[:, self.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // self.stride, images.shape[3] // self.stride))


def build_vit(arch: str, drop_path: float = 0.0) -> ViTEncoder:
    """Build a randomly initialized ViT by its timm name.

    Args:
        arch: the name, such as `vit_small_patch16_224`.
        drop_path: largest stochastic depth rate, which grows linearly from 0 over the blocks.
    """
    vit: Any = timm.create_model(arch, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path)
    vit.__class__ = ViTEncoder  # `create_model` knows the sizes of every variant, but only builds its own class
    vit.width, vit.stride = vit.embed_dim, vit.patch_embed.patch_size[0]
    return vit
