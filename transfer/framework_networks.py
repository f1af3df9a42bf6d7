"""The networks of timm, mmsegmentation and detectron2 with converted weights, as functions of images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.backbones import build_encoder, is_vit, vit_patch_size, with_patch_size

FeatureFunction = Callable[[Tensor], Tensor]
"""Normalized images (B, 3, H, W) -> the last feature map of a ResNet, or the tokens (B, N, width) of a ViT."""

DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
"""The ResNets that detectron2 and mmseg build from a depth."""


def has_network(target: str, arch: str) -> bool:
    """Return whether a format is that of a framework that has networks of this architecture."""
    return target == "timm" or (target in ("mmseg", "detectron2") and (arch in DEPTHS or is_vit(arch)))


def load_network(target: str, path: Path, arch: str) -> FeatureFunction:
    """Build the network of a framework, and load a converted file by the framework's own functions.

    Args:
        target: the framework, which `has_network` of this architecture.

    Raises:
        ImportError: the framework is not installed.
        Exception: any that the framework raises for a file that it cannot load.
    """
    if target == "timm":
        return _timm_network(path, arch)
    if target == "mmseg":
        return _mmseg_vit(path, arch) if is_vit(arch) else _mmseg_resnet(path, arch)
    return _detectron2_vit(path, arch) if is_vit(arch) else _detectron2_resnet(path, arch)


class _ViTSizes(NamedTuple):
    width: int
    depth: int
    num_heads: int


def _vit_sizes(arch: str) -> _ViTSizes:
    with torch.device("meta"):
        network: Any = build_encoder(arch)
    return _ViTSizes(network.width, len(network.blocks), network.blocks[0].attn.num_heads)


def _to_tokens(maps: Tensor) -> Tensor:
    """Return the tokens (B, h w, width) of feature maps (B, width, h, w)."""
    return maps.flatten(2).transpose(1, 2)


def _timm_network(path: Path, arch: str) -> FeatureFunction:
    import timm

    options: dict[str, Any] = {}
    if is_vit(arch):
        # timm has names for some patch sizes only, and takes any as an argument.
        options = {"patch_size": vit_patch_size(arch), "dynamic_img_size": True}
        arch = with_patch_size(arch, 16)
    network: Any = timm.create_model(arch, num_classes=0, checkpoint_path=str(path), **options)
    return network.eval().forward_features


def _mmseg_resnet(path: Path, arch: str) -> FeatureFunction:
    import mmseg.models

    network = mmseg.models.ResNet(depth=DEPTHS[arch], style="pytorch")
    _load_mmseg(network, path)
    return lambda images: network(images)[-1]


def _mmseg_vit(path: Path, arch: str) -> FeatureFunction:
    import mmseg.models

    sizes = _vit_sizes(arch)
    network = mmseg.models.VisionTransformer(
        patch_size=vit_patch_size(arch),
        embed_dims=sizes.width,
        num_layers=sizes.depth,
        num_heads=sizes.num_heads,
        norm_cfg={"type": "LN", "eps": 1e-6},
        patch_bias=True,
        final_norm=True,
        output_cls_token=True,
    )
    _load_mmseg(network, path)

    def compute_tokens(images: Tensor) -> Tensor:
        maps, class_token = network(images)[-1]
        return torch.cat([class_token[:, None], _to_tokens(maps)], dim=1)

    return compute_tokens


def _load_mmseg(network: nn.Module, path: Path) -> None:
    from mmengine.runner.checkpoint import load_checkpoint

    load_checkpoint(network, str(path), map_location="cpu", strict=True)
    network.eval()


def _detectron2_resnet(path: Path, arch: str) -> FeatureFunction:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    config.MODEL.RESNETS.DEPTH = DEPTHS[arch]
    config.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    config.MODEL.RESNETS.NORM = "BN"
    config.MODEL.RESNETS.STRIDE_IN_1X1 = False
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if arch in ("resnet18", "resnet34") else 256
    network = build_backbone(config, ShapeSpec(channels=3))
    DetectionCheckpointer(network).load(str(path))
    network.eval()
    return lambda images: network(images)["res5"]


def _detectron2_vit(path: Path, arch: str) -> FeatureFunction:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling.backbone.vit import ViT

    sizes = _vit_sizes(arch)
    network = ViT(
        img_size=224,
        patch_size=vit_patch_size(arch),
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"net": network})})  # the names in the file begin so
    DetectionCheckpointer(detector).load(str(path))
    network.eval()
    return lambda images: _to_tokens(network(images)["last_feat"])
