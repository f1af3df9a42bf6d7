"""The mmsegmentation backbone for ViTs, which the `fpn_vit` configs import."""

import torch
import torch.nn.functional as F
from mmseg.models import VisionTransformer
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class DINOVisionTransformer(VisionTransformer):
    """mmsegmentation's `VisionTransformer` with the position embeddings of `models.vit` at every size of images.

    They are resized by the rule of DINO (arXiv 2104.14294), as in pre-training, wherever the numbers of patches per
    row and column differ from those of `img_size`. mmsegmentation's own rule differs, and compares only the total
    numbers of patches, which are equal for example for images of 224 x 224 and 112 x 448 pixels.
    """

    def _pos_embeding(self, patched_img: Tensor, hw_shape: tuple[int, int], pos_embed: Tensor) -> Tensor:
        """Add position embeddings (1, 1 + N, C) to the class token and the patches (B, 1 + h w, C)."""
        grid = tuple(side // self.patch_size for side in self.img_size)
        if tuple(hw_shape) != grid:
            planes = pos_embed[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
            factors = [(size + 0.1) / original for size, original in zip(hw_shape, grid, strict=True)]
            planes = F.interpolate(planes, scale_factor=factors, mode="bicubic")
            pos_embed = torch.cat([pos_embed[:, :1], planes.flatten(2).transpose(1, 2)], dim=1)
        return self.drop_after_pos(patched_img + pos_embed)
