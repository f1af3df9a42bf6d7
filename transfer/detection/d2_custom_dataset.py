"""The custom dataset of a command: its flags, and its annotations and images, read and checked."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from transfer.detection.coco_json import CocoData, read_classes, read_coco
from utils.errors import UsageError

FLAGS = ("--train-json", "--train-images", "--val-json", "--val-images")
"""The flags of a custom dataset, which are used together; --eval-only does not need --train-images."""

CustomDataset = Mapping[str, CocoData]
"""Split -> its images with annotations: `train` and `val`, or `val` alone for --eval-only."""

_FROM_DATASET = ("DATASETS.TRAIN", "DATASETS.TEST", "MODEL.ROI_HEADS.NUM_CLASSES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a custom dataset."""
    add = parser.add_argument_group("custom dataset in COCO's format").add_argument
    classes = "annotations of the training images; its categories are the classes"
    add("--train-json", type=Path, metavar="FILE", help=classes)
    add("--train-images", type=Path, metavar="FOLDER", help="images of --train-json; not needed by --eval-only")
    add("--val-json", type=Path, metavar="FILE", help="annotations of the validation images")
    add("--val-images", type=Path, metavar="FOLDER", help="images of --val-json")


def uses_custom_dataset(args: argparse.Namespace) -> bool:
    """Return whether a command has the flags of a custom dataset.

    Raises:
        UsageError: only some of the flags are given, or flags or KEY VALUE pairs that exclude them.
    """
    given = [flag for flag in FLAGS if getattr(args, flag[2:].replace("-", "_"))]
    if not given:
        return False
    required = [flag for flag in FLAGS if not (args.eval_only and flag == "--train-images")]
    missing = next((flag for flag in required if flag not in given), None)
    if missing:
        raise UsageError(f"{missing} is missing; {', '.join(required[:-1])} and {required[-1]} go together")
    if args.auto_scale:
        raise UsageError("--auto-scale: custom datasets have a schedule of their own; change SOLVER.IMS_PER_BATCH")
    for key in args.opts[::2]:
        if key in _FROM_DATASET:
            raise UsageError(f"{key}: follows from --train-json and --val-json; leave it out")
    return True


def read_custom_dataset(args: argparse.Namespace) -> CustomDataset | None:
    """Read and check the custom dataset of a command; None if it has none. --eval-only reads no training images.

    Raises:
        UsageError: as `uses_custom_dataset`, `read_classes` and `read_coco`.
    """
    if not uses_custom_dataset(args):
        return None
    if args.eval_only:
        return {"val": read_coco("val", args.val_json, args.val_images, read_classes(args.train_json))}
    train = read_coco("train", args.train_json, args.train_images)
    return {"train": train, "val": read_coco("val", args.val_json, args.val_images, train.classes)}
