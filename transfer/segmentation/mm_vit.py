"""The mmsegmentation backbone for ViTs, which the `fpn_vit` configs import."""

import torch
from mmseg.models import VisionTransformer
from mmseg.registry import MODELS
from torch import Tensor

from models.vit import resize_position_embeddings


@MODELS.register_module()
class DINOVisionTransformer(VisionTransformer):
    """mmsegmentation's `VisionTransformer`, whose position embeddings are resized by DINO's rule, hence the name.

    Pre-training resizes them in the same way (`models.vit`). mmsegmentation's own rule differs, and compares only the
    total numbers of patches, which are equal for example for images of 224 x 224 and 112 x 448 pixels.
    """

    def _pos_embeding(self, patched_img: Tensor, hw_shape: tuple[int, int], pos_embed: Tensor) -> Tensor:
        """Add position embeddings (1, 1 + N, C) to the class token and the patches (B, 1 + h w, C)."""
        grid = [side // self.patch_size for side in self.img_size]
        positions = resize_position_embeddings(pos_embed[:, 1:], grid, hw_shape)
        pos_embed = torch.cat([pos_embed[:, :1], positions], dim=1)
        return self.drop_after_pos(patched_img + pos_embed)
