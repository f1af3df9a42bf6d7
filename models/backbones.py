"""Encoders: images (B, 3, H, W) -> feature map (B, C, h, w), from torchvision's ResNets and timm's ViTs."""

import argparse
import re
from collections import OrderedDict

from torch import nn
from torchvision import models as torchvision_models

from utils.config import at_least, between
from utils.errors import UsageError

RESNETS = (
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
VITS = (
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch16_224",
    "vit_small_patch8_224",
    "vit_base_patch32_224",
    "vit_base_patch16_224",
    "vit_base_patch8_224",
    "vit_large_patch32_224",
    "vit_large_patch16_224",
    "vit_large_patch14_224",
)
ARCHITECTURES = RESNETS + VITS
VIT_IMAGE_SIZE = 224
"""Side of the images, in pixels, to which the position embeddings of a ViT belong."""
_VIT_NAME = re.compile(rf"(vit_(?:tiny|small|base|large)_patch)([1-9]\d*)(_{VIT_IMAGE_SIZE})")
_DEFAULT_STRIDE = 32
_DILATED_STAGES = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}
_NOT_DILATABLE = ("resnet18", "resnet34")  # the basic blocks of torchvision have no dilation


def is_vit(arch: str) -> bool:
    """Return whether an architecture is a ViT: one of `VITS`, or one of these with another patch size in its name."""
    return _VIT_NAME.fullmatch(arch) is not None


def vit_patch_size(arch: str) -> int:
    """Return the patch size in the name of a ViT."""
    match = _VIT_NAME.fullmatch(arch)
    assert match, arch
    return int(match[2])


def with_patch_size(arch: str, patch_size: int) -> str:
    """Return the name of a ViT with another patch size."""
    return _VIT_NAME.sub(rf"\g<1>{patch_size}\g<3>", arch)


def _architecture(name: str) -> str:
    """Return the name of an architecture, for argparse."""
    if name in RESNETS or is_vit(name):
        return name
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ARCHITECTURES)}")


class Encoder(nn.Module):
    """The interface of an encoder; the names of its parameters are those of its library."""

    width: int
    """Channels of the feature map."""
    stride: int
    """Pixels of the image for each cell of the feature map, in each direction."""

    def check_image_size(self, size: int, flag: str = "--image-size") -> None:
        """Check that the encoder takes square images of `size` pixels.

        Args:
            flag: the flag that sets the size, which begins the message.

        Raises:
            UsageError: it does not.
        """


class ResNetEncoder(Encoder, nn.Sequential):
    """A torchvision ResNet without pooling and classifier.

    The last batch norm of each residual block starts at zero, so that every block starts as the identity.
    """

    def __init__(self, arch: str, output_stride: int):
        resnet: torchvision_models.ResNet = torchvision_models.get_model(
            arch,
            weights=None,
            zero_init_residual=True,
            replace_stride_with_dilation=_DILATED_STAGES[output_stride],
        )
        layers = ((name, layer) for name, layer in resnet.named_children() if name not in ("avgpool", "fc"))
        super().__init__(OrderedDict(layers))
        self.width, self.stride = resnet.fc.in_features, output_stride


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the encoder."""
    group.add_argument(
        "--arch",
        type=_architecture,
        metavar="ARCH",
        default="resnet50",
        help="encoder: a ResNet of torchvision (resnet18 ...) or a ViT of timm (vit_tiny_patch16_224 ...)",
    )
    group.add_argument(
        "--patch-size", type=at_least(1), help="side of a ViT's patches in pixels (default: that in the name of --arch)"
    )
    group.add_argument(
        "--output-stride",
        type=int,
        choices=_DILATED_STAGES,
        default=_DEFAULT_STRIDE,
        help="stride of the feature map: 16 and 8 dilate ResNet-50 and larger; that of a ViT is its patch size",
    )


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the encoder that only have an effect in training."""
    group.add_argument(
        "--drop-path",
        type=between(0, 1),
        default=0.0,
        help="largest stochastic depth rate of the student's blocks; ViTs only",
    )


def resolve_patch_size(args: argparse.Namespace) -> None:
    """Make `args.arch` and `args.patch_size` agree: --patch-size replaces the patch size in the name of --arch.

    Raises:
        UsageError: --patch-size is given, and --arch is not a ViT, or is one for images smaller than a patch.
    """
    if is_vit(args.arch):
        args.patch_size = args.patch_size or vit_patch_size(args.arch)
        if args.patch_size > VIT_IMAGE_SIZE:
            raise UsageError(f"--patch-size {args.patch_size}: larger than the {VIT_IMAGE_SIZE} px of {args.arch}")
        args.arch = with_patch_size(args.arch, args.patch_size)
    elif args.patch_size:
        raise UsageError(f"--patch-size {args.patch_size}: a {args.arch} has no patches; omit it, or use a ViT")


def build_encoder(arch: str, output_stride: int = _DEFAULT_STRIDE, drop_path: float = 0.0) -> Encoder:
    """Build a randomly initialized encoder.

    Args:
        arch: one of `ARCHITECTURES`, or a ViT with another patch size in its name.
        output_stride: 32, 16 or 8, for ResNets; the stride of a ViT is its patch size.
        drop_path: largest stochastic depth rate of a ViT, which grows linearly from 0 over its blocks.

    Raises:
        UsageError: the architecture is unknown, or cannot have this output stride or drop path.
    """
    if is_vit(arch):
        if output_stride != _DEFAULT_STRIDE:
            raise UsageError(f"--output-stride {output_stride}: the stride of a {arch} is its patch size; omit it")
        try:
            from models.vit import build_vit
        except ImportError:
            raise UsageError(f"--arch {arch}: needs timm; pip install timm") from None
        return build_vit(arch, drop_path)
    if arch not in RESNETS:
        raise UsageError(f"--arch {arch}: unknown; choose one of {', '.join(ARCHITECTURES)}")
    if output_stride != _DEFAULT_STRIDE and arch in _NOT_DILATABLE:
        raise UsageError(f"--output-stride {output_stride}: {arch} cannot be dilated; use 32, or resnet50 and larger")
    if drop_path:
        raise UsageError(f"--drop-path {drop_path:g}: only ViTs have it, not a {arch}; use --drop-path 0")
    return ResNetEncoder(arch, output_stride)
