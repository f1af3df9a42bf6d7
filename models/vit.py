"""timm's vision transformers as dense encoders."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.backbones import Encoder, vit_patch_size, with_patch_size
from utils.errors import UsageError


class ViTEncoder(VisionTransformer, Encoder):
    """A ViT that returns its patch tokens as a map, for images whose sides are multiples of the patch size.

    Position embeddings follow the size of the images by `resize_position_embeddings`. timm's own rule differs a little,
    except at the size in the name of the architecture.
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
        class_token = self.cls_token + embeddings[:, :1]
        positions = resize_position_embeddings(embeddings[:, 1:], self.patch_embed.grid_size, x.shape[1:3])
        return torch.cat(
            [class_token.to(x.dtype).expand(len(x), -1, -1), x.flatten(1, 2) + positions.to(x.dtype)], dim=1
        )

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Map images (B, 3, H, W) to (B, width, H / stride, W / stride)."""
        tokens = self.forward_features(images)[:, self.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, (images.shape[2] // self.stride, images.shape[3] // self.stride))


def resize_position_embeddings(positions: Tensor, grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Interpolate the position embeddings of patches by the rule of DINO (arXiv 2104.14294), which GTSA shares.

    The interpolation is bicubic by the factor (n + 0.1) / N for n patches instead of N, without antialiasing.

    Args:
        positions: (1, N, width) without the class token's.
        grid: rows and columns of the N patches.
        size: rows and columns of the result.

    Returns:
        (1, n, width); `positions` itself where the size is that of the grid.
    """
    if tuple(size) == tuple(grid):
        return positions
    planes = positions.unflatten(1, tuple(grid)).permute(0, 3, 1, 2).float()
    factors = [(new + 0.1) / old for new, old in zip(size, grid, strict=True)]
    planes = F.interpolate(planes, scale_factor=factors, mode="bicubic")
    return planes.flatten(2).transpose(1, 2).to(positions.dtype)


def build_vit(arch: str, drop_path: float = 0.0) -> ViTEncoder:
    """Build a randomly initialized ViT by its timm name.

    Args:
        arch: the name, such as `vit_small_patch16_224`; also with a patch size that timm has no name for.
        drop_path: largest stochastic depth rate, which grows linearly from 0 over the blocks.
    """
    patch_size = vit_patch_size(arch)
    name = with_patch_size(arch, 16)  # which timm has for all widths and depths
    vit: Any = timm.create_model(
        name, patch_size=patch_size, num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path
    )
    vit.__class__ = ViTEncoder  # `create_model` knows the sizes of every variant, but only builds its own class
    vit.width, vit.stride = vit.embed_dim, vit.patch_embed.patch_size[0]
    return vit
