"""A backbone for detectron2's configs: its ViT, whose outputs of four blocks feed an FPN at the strides 4 to 32."""

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm.layers
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from models.vit import resize_position_embeddings
from utils.errors import UsageError

# detectron2 imports timm's layers by their former name, which timm deprecates with a warning.
sys.modules.setdefault("timm.models.layers", timm.layers)

_STRIDES = (4, 8, 16, 32)
_HEAD_WIDTH = 64


def add_vit_config(cfg: CfgNode) -> None:
    """Add the keys of the backbone and of its optimizer to detectron2's config; the optimizer stays SGD.

    The values of MODEL.VIT are those of COCO_ViT_S_FPN_1x_GTSA.yaml, which repeats them to be a complete recipe.
    """
    cfg.MODEL.VIT = CfgNode()
    cfg.MODEL.VIT.EMBED_DIM = 384  # ViT-S; a head has 64 channels at every width
    cfg.MODEL.VIT.DEPTH = 12
    cfg.MODEL.VIT.PATCH_SIZE = 16
    cfg.MODEL.VIT.DROP_PATH_RATE = 0.1  # of the last block; it grows linearly from 0
    cfg.MODEL.VIT.OUT_BLOCKS = (4, 6, 8, 12)  # counted from 1, one for each stride; DEPTH is the last
    cfg.SOLVER.OPTIMIZER = "SGD"  # or ADAMW
    cfg.SOLVER.LAYER_DECAY = 1.0  # of ADAMW on a ViT: the learning rate's factor from each block to the one below


def check_vit(cfg: CfgNode) -> None:
    """Check the values of MODEL.VIT.

    Raises:
        UsageError: one is not possible.
    """
    vit = cfg.MODEL.VIT
    if vit.EMBED_DIM < 1 or vit.EMBED_DIM % _HEAD_WIDTH:
        raise UsageError(f"MODEL.VIT.EMBED_DIM {vit.EMBED_DIM}: must be a multiple of {_HEAD_WIDTH}, such as 384")
    if vit.PATCH_SIZE not in (8, 16, 32):
        raise UsageError(f"MODEL.VIT.PATCH_SIZE {vit.PATCH_SIZE}: must be 8, 16 or 32")
    if not 0 <= vit.DROP_PATH_RATE < 1:
        raise UsageError(f"MODEL.VIT.DROP_PATH_RATE {vit.DROP_PATH_RATE}: must be at least 0 and below 1")
    blocks = sorted(set(vit.OUT_BLOCKS) & set(range(1, vit.DEPTH + 1)))
    # Blocks above the last one would have no gradient, which stops training on several GPUs.
    if blocks != list(vit.OUT_BLOCKS) or len(blocks) != len(_STRIDES) or blocks[-1] != vit.DEPTH:
        raise UsageError(
            f"MODEL.VIT.OUT_BLOCKS {vit.OUT_BLOCKS}: must be four growing numbers from 1 on, the last of them "
            f"MODEL.VIT.DEPTH {vit.DEPTH}"
        )


class MultiOutputViT(ViT):
    """detectron2's ViT, which returns the outputs of several blocks.

    There is no class token. Position embeddings follow the size of the images as in `models.vit.ViTEncoder`;
    detectron2's own rule differs.
    """

    def __init__(self, out_blocks: Sequence[int], embed_dim: int, patch_size: int, **options: Any):
        """Initialize with detectron2's `options` and the numbers, from 1 on, of the blocks to return."""
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(embed_dim=embed_dim, patch_size=patch_size, norm_layer=norm, **options)
        self.out_blocks = tuple(out_blocks)
        self._out_features = [f"block{number}" for number in out_blocks]
        self._out_feature_channels = dict.fromkeys(self._out_features, embed_dim)
        self._out_feature_strides = dict.fromkeys(self._out_features, patch_size)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to maps (B, width, H / patch size, W / patch size) by the names of their blocks."""
        tokens = self.patch_embed(images)
        side, size = math.isqrt(self.pos_embed.shape[1]), tokens.shape[1:3]
        positions = resize_position_embeddings(self.pos_embed[:, 1:], (side, side), size)
        tokens = tokens + positions.unflatten(1, size)
        outputs = {}
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in self.out_blocks:
                outputs[f"block{number}"] = tokens.permute(0, 3, 1, 2)
        return outputs


class RescaledBlocks(Backbone):
    """Resample the outputs of four blocks to the strides 4, 8, 16 and 32: by transposed convolutions or max pooling."""

    def __init__(self, input_shape: dict[str, ShapeSpec], norm: str):
        """Initialize for blocks of `input_shape`, with detectron2's `norm` between two transposed convolutions."""
        super().__init__()
        self.rescale = nn.ModuleDict()
        self._out_features = [f"stride{stride}" for stride in _STRIDES]
        self._out_feature_strides = dict(zip(self._out_features, _STRIDES, strict=True))
        self._out_feature_channels = {}
        for name, block in zip(self._out_features, input_shape.values(), strict=True):
            self.rescale[name] = _rescale(block.channels, block.stride, self._out_feature_strides[name], norm)
            self._out_feature_channels[name] = block.channels

    def forward(self, blocks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map the outputs of the blocks to maps of the same width by the names of their strides."""
        return {
            name: rescale(block) for (name, rescale), block in zip(self.rescale.items(), blocks.values(), strict=True)
        }


def _rescale(width: int, stride: int, new_stride: int, norm: str) -> nn.Module:
    """Return layers that map a map of `width` channels from one stride to another."""
    if new_stride > stride:
        return nn.MaxPool2d(new_stride // stride)
    layers: list[nn.Module] = []
    while stride > new_stride:
        if layers:
            layers += [get_norm(norm, width) or nn.Identity(), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
        stride //= 2
    return nn.Sequential(*layers)


class ViTFPN(Backbone):
    """A ViT (`net`), the pyramid over the outputs of its blocks, and an FPN (`fpn`) with a level of stride 64."""

    def __init__(self, net: MultiOutputViT, cfg: CfgNode):
        super().__init__()
        self.net = net
        self.fpn = FPN(
            bottom_up=RescaledBlocks(net.output_shape(), cfg.MODEL.FPN.NORM),
            in_features=cfg.MODEL.FPN.IN_FEATURES,
            out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
            norm=cfg.MODEL.FPN.NORM,
            top_block=LastLevelMaxPool(),
            fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        )

    @property
    def size_divisibility(self) -> int:
        return self.fpn.size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.fpn.output_shape()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W), whose sides are multiples of 32, to the levels `p2` to `p6` of the FPN."""
        return self.fpn(self.net(images))


def build_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ViTFPN:
    """Build the backbone of a config, whose values `check_vit` has checked."""
    vit = cfg.MODEL.VIT
    with torch.device("cpu"):  # detectron2 reads the drop path rates from a tensor, which the meta device cannot
        net = MultiOutputViT(
            vit.OUT_BLOCKS,
            embed_dim=vit.EMBED_DIM,
            patch_size=vit.PATCH_SIZE,
            in_chans=input_shape.channels,
            depth=vit.DEPTH,
            num_heads=vit.EMBED_DIM // _HEAD_WIDTH,
            drop_path_rate=vit.DROP_PATH_RATE,
        )
    return ViTFPN(net, cfg)


BACKBONE_REGISTRY.register(build_vit_fpn_backbone)
