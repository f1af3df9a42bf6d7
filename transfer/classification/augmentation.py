"""Augmentation of labeled images by timm: RandAugment, random erasing, mixup, cutmix and label smoothing.

Importing this module replaces timm's posterize operations in the whole process, because timm has no other way to do it.
"""

import argparse
from collections.abc import Callable
from functools import partial

from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.mixup import mixup_target
from torch import Tensor

from transfer.classification.labeled_images import Transform
from utils.batch import MEAN, STD
from utils.config import at_least, between
from utils.errors import UsageError

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, S, S) and labels (B,) -> images, and targets (B, classes) that sum to 1."""


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    return ImageOps.posterize(image, min(max(bits_to_keep, 1), 8))


# At its largest magnitude timm keeps 0 bits, which Pillow 13 refuses and earlier versions turned into a black image.
NAME_TO_OP.update({name: _posterize for name in NAME_TO_OP if name.startswith("Posterize")})


def add_augmentation_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the augmentation."""
    add, non_negative = group.add_argument, at_least(0, float)
    add("--auto-augment", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="policy of timm, or none")
    add("--random-erasing", type=between(0, 1), default=0.25, help="probability of random erasing")
    add("--mixup", type=non_negative, default=0.8, help="alpha of mixup; 0 disables it")
    add("--cutmix", type=non_negative, default=1.0, help="alpha of cutmix; 0 disables it")
    add("--label-smoothing", type=between(0, 1), default=0.1, help="label smoothing")


def build_train_transform(args: argparse.Namespace) -> Transform:
    """Build the transform of training images: random crop, flip, `--auto-augment` and random erasing.

    Raises:
        UsageError: timm has no such policy.
    """
    policy = None if args.auto_augment == "none" else args.auto_augment
    try:
        return create_transform(
            args.image_size,
            is_training=True,
            color_jitter=0.0,
            auto_augment=policy,
            interpolation="bicubic",
            re_prob=args.random_erasing,
            re_mode="pixel",
            mean=MEAN,
            std=STD,
        )
    except (AssertionError, KeyError, ValueError, IndexError):
        raise UsageError(
            f"--auto-augment {policy}: timm has no such policy; use rand-m9-mstd0.5-inc1 or none"
        ) from None


def build_val_transform(image_size: int) -> Transform:
    """Build the transform of validation images: a short side of `image_size / 0.875`, and the center square."""
    return create_transform(image_size, interpolation="bicubic", crop_pct=0.875, mean=MEAN, std=STD)


def build_mix(args: argparse.Namespace, num_classes: int) -> Mix:
    """Build mixup and cutmix, between which each batch chooses at random, with smoothed targets."""
    if args.mixup or args.cutmix:
        return Mixup(args.mixup, args.cutmix, label_smoothing=args.label_smoothing, num_classes=num_classes)
    return partial(_smooth, num_classes=num_classes, smoothing=args.label_smoothing)


def _smooth(images: Tensor, labels: Tensor, num_classes: int, smoothing: float) -> tuple[Tensor, Tensor]:
    return images, mixup_target(labels, num_classes, smoothing=smoothing)
