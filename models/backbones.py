"""Encoders: images (B, 3, H, W) -> feature map (B, C, h, w)."""

import argparse
from collections import OrderedDict

from torch import nn
from torchvision import models as torchvision_models

from utils.errors import UsageError

ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
_UNDILATED = ("resnet18", "resnet34")  # torchvision's basic blocks have no dilation

_DILATED_STAGES = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that say which encoder."""
    group.add_argument("--arch", choices=ARCHITECTURES, default="resnet50", help="encoder, by torchvision's name")
    group.add_argument(
        "--output-stride",
        type=int,
        choices=_DILATED_STAGES,
        default=32,
        help="pixels to a cell, below 32 by dilation",
    )


def build_encoder(arch: str, output_stride: int = 32) -> tuple[nn.Sequential, int]:
    """A torchvision ResNet up to its last map, under torchvision's parameter names, without pooling and classifier.

    The last batch norm of each residual block starts at zero, so that every block starts as the identity.

    Returns:
        The encoder, images (B, 3, H, W) -> (B, C, H / stride, W / stride), and C.

    Raises:
        UsageError: the architecture is unknown, or torchvision cannot dilate it to `output_stride`.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"--arch {arch}: unknown; choose one of {', '.join(ARCHITECTURES)}")
    if output_stride != 32 and arch in _UNDILATED:
        raise UsageError(f"--output-stride {output_stride}: {arch} has no dilated form; use 32, or resnet50 and larger")
    resnet: torchvision_models.ResNet = torchvision_models.get_model(
        arch,
        weights=None,
        zero_init_residual=True,
        replace_stride_with_dilation=_DILATED_STAGES[output_stride],
    )
    stages = OrderedDict((name, part) for name, part in resnet.named_children() if name not in ("avgpool", "fc"))
    return nn.Sequential(stages), resnet.fc.in_features
