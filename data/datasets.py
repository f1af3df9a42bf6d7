"""Image datasets: COCO, COCO+, ImageNet, ADE20K, any folder, the demo; an index gives the views of one image."""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import EncodedImage, pixel_image, read_encoded
from data.demo import make_demo
from data.views import center_view, draw_views, make_views
from utils import distributed
from utils.batch import ViewRecord
from utils.config import at_least, between
from utils.errors import UsageError
from utils.view_recipes import ViewRecipe, two_view_recipes

FOLDERS: dict[str, tuple[str, ...]] = {
    "COCO": ("train2017",),
    "COCOplus": ("train2017", "unlabeled2017"),
    "COCOval": ("val2017",),
    "ImageNet": ("train",),
    "ADE20K": ("images/training",),
    "folder": ("",),
    "demo": ("train/images",),
}
"""The image folders of each dataset below --data-dir (for the demo, below the folder that it draws)."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
MAX_UNREADABLE_IN_A_ROW = 20
"""Unreadable files in a row after which a black image is taken; the run stops at its next report."""
_BLACK = Image.new("RGB", (256, 256))
_BLACK_ENCODED = pixel_image(_BLACK)
_ImageT = TypeVar("_ImageT")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of images and views."""
    group.add_argument("--dataset", choices=tuple(FOLDERS), default="COCO", help="layout of the images in --data-dir")
    group.add_argument(
        "--data-dir", default="./data", help="folder of the dataset; --dataset demo draws its scenes into it"
    )
    group.add_argument("--image-size", type=at_least(32), default=224, help="side of a view in pixels")
    group.add_argument(
        "--min-scale", type=between(0, 1), default=0.08, help="smallest crop, as a share of the image's area"
    )
    group.add_argument("--num-workers", type=at_least(0), default=8, help="DataLoader workers for each process")
    group.add_argument(
        "--decode",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where JPEG files are decoded, cropped and resized; gpu needs fewer CPU cores",
    )


@dataclass
class Sample(ViewRecord):
    """What a worker sends for one image: its views, or the image itself to be decoded on the device."""

    unreadable: tuple[str, ...] = ()
    """Files that could not be read, in whose place this image was taken."""
    encoded: EncodedImage | None = None


class MultiViewDataset:
    """The views of a list of image files, drawn from (seed, epoch, image number, view number) alone.

    Indices continue over epochs: index i is image `i % len` in epoch `i // len`. With `send_encoded` the views are
    only drawn, and the image is sent along for `data.decode.decode_views` to cut them from.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        recipes: Sequence[ViewRecipe],
        seed: int,
        send_encoded: bool = False,
    ):
        self.root, self.view_recipes, self.seed, self.send_encoded = root, tuple(recipes), seed, send_encoded
        # One array of bytes instead of a list of strings: forked workers share its memory.
        self.files = np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Return the views of an image, or of the next one that can be read."""
        epoch, number = divmod(int(index), len(self))
        if self.send_encoded:
            encoded, number, unreadable = self._read(number, read_encoded, _BLACK_ENCODED)
            record = draw_views(encoded.size, self.view_recipes, self.seed, epoch, number)
            return Sample(**vars(record), unreadable=tuple(unreadable), encoded=encoded)
        image, number, unreadable = self._read(number, _read_image, _BLACK)
        record = make_views(image, self.view_recipes, self.seed, epoch, number)
        return Sample(**vars(record), unreadable=tuple(unreadable))

    def center_crops(self, count: int, size: int) -> Tensor:
        """Return the central squares of `count` evenly spaced images: (count, 3, size, size) uint8."""
        images = (self._read(number, _read_image, _BLACK)[0] for number in evenly_spaced(len(self), count))
        return torch.stack([center_view(image, size) for image in images])

    def _read(self, number: int, read: Callable[[Path], _ImageT], black: _ImageT) -> tuple[_ImageT, int, list[str]]:
        return read_or_substitute(self.root, self.files, number, read, black)


def read_or_substitute(
    root: Path,
    files: np.ndarray,
    number: int,
    read: Callable[[Path], _ImageT],
    black: _ImageT,
    tries: int = MAX_UNREADABLE_IN_A_ROW,
) -> tuple[_ImageT, int, list[str]]:
    """Read image `number` of a list of files, or the next readable one.

    Args:
        root: the folder of the files.
        files: encoded by `os.fsencode`.
        number: of the image.
        read: reads a file, and raises any exception if it is damaged.
        black: takes the place of an image after `tries` unreadable files.
        tries: number of files to try.

    Returns:
        The image, or `black`; its number; and the files that could not be read, `tries` of them for `black`.
    """
    unreadable: list[str] = []
    for substitute in range(number, number + tries):
        substitute %= len(files)
        path = root / os.fsdecode(files[substitute])
        try:
            return read(path), substitute, unreadable
        except Exception:  # damaged files make the decoders of Pillow raise nearly any exception
            unreadable.append(str(path))
    return black, number, unreadable


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Return at most `limit` evenly spaced indices below `count`, or all of them."""
    limit = min(limit or count, count)
    return [number * count // limit for number in range(limit)]


def build_dataset(args: argparse.Namespace, recipes: Sequence[ViewRecipe] | None = None) -> MultiViewDataset:
    """Build the dataset that `args.dataset` and `args.data_dir` name.

    Args:
        args: the arguments of a run.
        recipes: the views of each image; by default the two views that SlotCon and SlotFA share.

    Raises:
        UsageError: a folder is missing or has no images.
    """
    root = Path(args.data_dir)
    if args.dataset == "demo":
        if distributed.local_rank() == 0:
            make_demo(root / "demo", args.seed)
        distributed.barrier()
        root = make_demo(root / "demo", args.seed)
    else:
        check_folder("--data-dir", root)
    files = sorted(file for folder in FOLDERS[args.dataset] for file in _find_images(root, folder, args.dataset))
    recipes = two_view_recipes(args.image_size, args.min_scale) if recipes is None else recipes
    # Commands that only evaluate have no --decode.
    return MultiViewDataset(root, files, recipes, args.seed, send_encoded=getattr(args, "decode", "cpu") == "gpu")


def check_folder(flag: str, folder: Path) -> None:
    """Check that the folder of a dataset exists.

    Raises:
        UsageError: there is no such folder, or it is a file; the message begins with `flag`.
    """
    if not folder.is_dir():
        raise UsageError(f"{flag} {folder}: {'is a file; name a folder' if folder.exists() else 'no such folder'}")


def _find_images(root: Path, folder: str, dataset: str) -> list[str]:
    """Return the image files at any depth below `root / folder`, relative to `root`."""
    if not (root / folder).is_dir():
        raise UsageError(f"--data-dir {root}: --dataset {dataset} needs the folder {folder}/ in it, which is missing")
    files = list(_walk(root, folder))
    if not files:
        raise UsageError(f"--data-dir {root / folder}: no images in it (looked for {' '.join(SUFFIXES)})")
    return files


def _walk(root: Path, folder: str) -> Iterator[str]:
    for entry in os.scandir(root / folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            yield from _walk(root, path)
        elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
            yield path
