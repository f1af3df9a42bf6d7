"""Fill in a config for a folder of one's own images: the data, the classes, and a schedule that follows its size."""

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.datasets import SUFFIXES
from transfer.probe.labeled_features import LAYOUTS, SegmentationDataset
from utils.config import at_least
from utils.errors import UsageError

_ADE20K_IMAGES, _ADE20K_ITERATIONS = 20210, 80000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run on one's own images."""
    group = parser.add_argument_group("own images, with a config of configs/folder")
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="folder with {train,val}/images and {train,val}/masks/*.png, as the probes read",
    )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="text file with the name of one class per line, in the masks' order, or the number of classes",
    )
    group.add_argument(
        "--crop-size",
        type=at_least(32),
        metavar="PIXELS",
        help="side of a crop, and short side of the resized images (default: 512)",
    )


def uses_folder(cfg: Any) -> bool:
    """Return whether a config is for a folder of one's own images."""
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
    if not folder.is_dir():
        raise UsageError(f"--data-dir {folder}: no such folder")
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
        lines = [line.strip() for line in Path(text).read_text(errors="replace").splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
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


def default_batch_size(num_images: int) -> int:
    """Return 16, or with fewer training images than that the largest power of two that they fill."""
    return 2 ** min(4, int(math.log2(num_images)))


def default_iterations(num_images: int, batch_size: int) -> int:
    """Return the length of a run in hundreds: ADE20K's times the square root of the ratio of the numbers of images.

    It is at most ADE20K's, and with a batch smaller than ADE20K's 16 so much longer that as many images are seen.
    """
    ratio = min(1, num_images / _ADE20K_IMAGES)
    return 100 * round(_ADE20K_ITERATIONS * math.sqrt(ratio) * 16 / batch_size / 100)


def set_schedule(cfg: Any) -> None:
    """Set batch, learning rate, length and intervals from the number of training images, where they are None.

    Raises:
        UsageError: the folder has no labeled images.
    """
    images = len(_find_pairs(_root_and_classes(cfg)[0], "train"))
    _set_missing(cfg.auto_scale_lr, "base_batch_size", default_batch_size(images))
    _set_missing(cfg.train_cfg, "max_iters", default_iterations(images, cfg.auto_scale_lr.base_batch_size))
    optimizer, length = cfg.optim_wrapper.optimizer, cfg.train_cfg.max_iters
    _set_missing(optimizer, "lr", 0.01 * cfg.auto_scale_lr.base_batch_size / 16)
    for schedule in cfg.param_scheduler:
        _set_missing(schedule, "end", length)
        _set_missing(schedule, "eta_min", optimizer.lr / 100)
    _set_missing(cfg.train_cfg, "val_interval", math.ceil(length / 5))
    _set_missing(cfg.default_hooks.checkpoint, "interval", min(2000, cfg.train_cfg.val_interval))
    _set_missing(cfg.default_hooks.logger, "interval", min(50, math.ceil(length / 20)))


def _set_missing(section: Any, key: str, value: float) -> None:
    """Set an entry of a config that exists and is None."""
    if key in section and section[key] is None:
        section[key] = value


def _find_pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the pairs of image and mask of a split; an image without a mask is left out.

    Raises:
        UsageError: there are none, or a mask has no image.
    """
    pairs = LAYOUTS["folder"].pairs(folder, split)
    if not pairs:
        raise UsageError(f"--data-dir {folder}: no image in {split}/images has a mask of its name in {split}/masks")
    if unpaired := set((folder / split / "masks").rglob("*.png")) - {mask for _, mask in pairs}:
        raise UsageError(f"{min(unpaired)}: has no image of its name in {folder / split / 'images'}")
    return pairs


def check_files(cfg: Any) -> None:
    """Check that all images and masks can be read, have equal sizes, and hold no other classes than the config's.

    Raises:
        UsageError: naming the first file that is wrong.
    """
    root, classes = _root_and_classes(cfg)
    for split, fewest in (("train", 2), ("val", 1)):
        _find_pairs(root, split)
        try:
            dataset = SegmentationDataset("folder", root, split, size=1)
            if len(dataset.classes) < fewest:
                values = "0 or void (255)" if dataset.classes else "void (255)"
                raise UsageError(f"{root / split / 'masks'}: all pixels are {values}; classes are 0, 1, and so on")
            dataset.classes = classes
            with ThreadPoolExecutor() as pool:  # Pillow decodes in several threads at once
                for _ in pool.map(dataset.__getitem__, range(len(dataset))):
                    pass
        except (SyntaxError, ValueError) as error:  # Pillow's for some damaged files
            raise UsageError(f"--data-dir {root}: a file of {split} cannot be read ({error})") from None


def _root_and_classes(cfg: Any) -> tuple[Path, tuple[str, ...]]:
    dataset = cfg.train_dataloader.dataset
    return Path(dataset.data_root), tuple(dataset.metainfo.classes)


def describe(cfg: Any) -> str:
    """Return two lines about a run on one's own images: its data, and its schedule."""
    root, classes = _root_and_classes(cfg)
    train, val = (len(_find_pairs(root, split)) for split in ("train", "val"))
    files = [path for split in ("train", "val") for path in (root / split / "images").rglob("*")]
    unlabeled = sum(path.suffix.lower() in SUFFIXES for path in files) - train - val
    left_out = f"; {unlabeled} images without a mask are left out" if unlabeled else ""
    batch, rate = cfg.auto_scale_lr.base_batch_size, cfg.optim_wrapper.optimizer.lr
    return (
        f"{root}: {train} training and {val} validation images of {len(classes)} classes{left_out}\n"
        f"{cfg.train_cfg.max_iters} iterations of {batch} images, learning rate {rate:g}, evaluation every "
        f"{cfg.train_cfg.val_interval} iterations"
    )
