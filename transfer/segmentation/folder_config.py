"""The flags of a custom dataset, a folder of images and masks, and what they set in a config of configs/folder."""

import argparse
from pathlib import Path
from typing import Any

from data.datasets import check_folder
from utils.config import at_least
from utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a custom dataset."""
    group = parser.add_argument_group("custom dataset, with a config of configs/folder")
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="folder with {train,val}/images and {train,val}/masks/*.png, as the probes read",
    )
    group.add_argument(
        "--classes",
        metavar="FILE_OR_NUMBER",
        help="text file with the name of one class per line, in the order of the masks' values, or the number of "
        "classes",
    )
    group.add_argument(
        "--crop-size",
        type=at_least(32),
        metavar="PIXELS",
        help="side of a crop, and short side of the resized images; for a ViT a multiple of its patch size, "
        "and at least two patches (default: 512)",
    )


def uses_folder(cfg: Any) -> bool:
    """Return whether a config is for a custom dataset."""
    return cfg.train_dataloader.dataset.get("type") == "FolderDataset"


def set_folder(cfg: Any, args: argparse.Namespace) -> None:
    """Set the data, the classes and the crop size of the command line.

    Raises:
        UsageError: a flag is missing or wrong, or the config has data of its own.
    """
    given = {"--data-dir": args.data_dir, "--classes": args.classes, "--crop-size": args.crop_size}
    if not uses_folder(cfg):
        if flag := next((flag for flag, value in given.items() if value is not None), ""):
            raise UsageError(f"{flag}: CONFIG {args.config} has its own data; use a config of configs/folder")
        return
    if args.data_dir is None and cfg.train_dataloader.dataset.data_root is None:
        raise UsageError(
            f"CONFIG {args.config}: names no data; to train, add --data-dir and --classes; to evaluate, use the config "
            "in the run's --work-dir"
        )
    if (args.data_dir is None) != (args.classes is None):
        raise UsageError("--data-dir and --classes: give both or neither")
    if args.data_dir is not None:
        _set_data(cfg, args.data_dir, _read_classes(args.classes))
    if args.crop_size is not None:
        _set_crop_size(cfg, args.crop_size)


def _set_data(cfg: Any, folder: Path, classes: tuple[str, ...]) -> None:
    check_folder("--data-dir", folder)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(folder.absolute())
        loader.dataset.metainfo = {"classes": classes}
    for head in (cfg.model.decode_head, cfg.model.get("auxiliary_head")):
        if head is not None:
            head.num_classes = len(classes)


def _read_classes(text: str) -> tuple[str, ...]:
    """Return the names of the classes from the value of --classes, a number or a file."""
    if text.isdecimal():
        names = [f"class {number}" for number in range(int(text))]
    elif Path(text).is_file():
        lines = Path(text).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    else:
        raise UsageError(f"--classes {text}: neither a number nor a file with the name of one class per line")
    if not 2 <= len(names) <= 255:
        raise UsageError(f"--classes {text}: {len(names)} classes; there can be 2 to 255")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"--classes {text}: has {min(repeated)!r} more than once; give every class its own name")
    return tuple(names)


def _set_crop_size(cfg: Any, size: int) -> None:
    cfg.model.data_preprocessor.size = (size, size)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for transform in loader.dataset.pipeline:
            if "scale" in transform:
                transform.scale = (4 * size, size)
            if "crop_size" in transform:
                transform.crop_size = (size, size)
