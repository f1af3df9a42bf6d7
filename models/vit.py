"""timm's vision transformers as dense encoders."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.backbones import Encoder, vit_patch_size
from utils.errors import UsageError


class ViTEncoder(VisionTransformer, Encoder):
    """A ViT that returns its patch tokens as a map, for images whose sides are multiples of the patch size.

    Position embeddings follow the size of the images by the rule of DINO (arXiv 2104.14294) and of GTSA: bicubic
    interpolation by the factor (n + 0.1) / N for n patches instead of N, without antialiasing. timm's own rule differs
    a little, except at the size of pre-training.
    """

    def check_image_size(self, size: int, flag: str = "--image-size") -> None:
        """Check that the patches divide square images of `size` pixels.

        Raises:
            UsageError: they do not; it names `flag`.
        """
        if size % self.stride:
            below = size - size % self.stride
            sizes = f"{below} or {below + self.stride}" if below else f"{self.stride}"
            raise UsageError(f"{flag} {size}: not a multiple of the patch size {self.stride}; use {sizes}")

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add position embeddings to patches (B, h, w, width), and prepend the class token: (B, 1 + h w, width)."""
        embeddings: Any = self.pos_embed
        class_position, positions = embeddings[:, :1], embeddings[:, 1:]
        grid, size = self.patch_embed.grid_size, x.shape[1:3]
        if size != grid:
            planes = positions.unflatten(1, grid).permute(0, 3, 1, 2)
            factors = ((size[0] + 0.1) / grid[0], (size[1] + 0.1) / grid[1])
            planes = F.interpolate(planes.float(), scale_factor=factors, mode="bicubic").to(x.dtype)
            positions = planes.flatten(2).transpose(1, 2)
        class_token = self.cls_token + class_position
        return torch.cat([class_token.to(x.dtype).expand(len(x), -1, -1), x.flatten(1, 2) + positions], dim=1)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Map images (B, 3, H, W) to (B, width, H / stride, W / stride)."""
        tokens = self.forward_features(images)[:, self.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // self.stride, images.shape[3] // self.stride))


def build_vit(arch: str, drop_path: float = 0.0) -> ViTEncoder:
    """Build a randomly initialized ViT by its timm name.

    Args:
        arch: the name, such as `vit_small_patch16_224`; also with a patch size that timm has no name for.
        drop_path: largest stochastic depth rate, which grows linearly from 0 over the blocks.
    """
    patch_size = vit_patch_size(arch)
    name = arch.replace(f"_patch{patch_size}_", "_patch16_")  # timm has this patch size for all widths and depths
    vit: Any = timm.create_model(
        name, patch_size=patch_size, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path
    )
    vit.__class__ = ViTEncoder  # `create_model` knows the sizes of every variant, but only builds its own class
    vit.width, vit.stride = vit.embed_dim, vit.patch_embed.patch_size[0]
    return vit
