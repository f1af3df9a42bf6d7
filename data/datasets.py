"""Which images: COCO, COCO+, ImageNet, ADE20K, any folder, the demo; index -> what a worker sends for one image."""

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

from data.decode import Source, pixel_source, read_source
from data.demo import make_demo
from data.views import ViewRecipe, center_view, draw_views, make_views, slotcon_views
from utils import distributed
from utils.config import at_least, between
from utils.errors import UsageError

# The folders of each data set below --data-dir (the demo's below the folder it makes).
FOLDERS: dict[str, tuple[str, ...]] = {
    "COCO": ("train2017",),
    "COCOplus": ("train2017", "unlabeled2017"),
    "COCOval": ("val2017",),
    "ImageNet": ("train",),
    "ADE20K": ("images/training",),
    "folder": ("",),
    "demo": ("train/images",),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
_TRIES = 20
_BLACK = Image.new("RGB", (256, 256))
_BLACK_SOURCE = pixel_source(_BLACK)
_Read = TypeVar("_Read")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that say which images and views."""
    group.add_argument("--dataset", choices=tuple(FOLDERS), default="COCO", help="layout of the images in --data-dir")
    group.add_argument("--data-dir", default="./data", help="folder of the data set; the demo is made there")
    group.add_argument("--image-size", type=at_least(32), default=224, help="side of a view, pixels")
    group.add_argument("--min-scale", type=between(0, 1), default=0.08, help="smallest crop, share of the image's area")
    group.add_argument("--num-workers", type=at_least(0), default=8, help="processes that read images, for each GPU")
    group.add_argument(
        "--decode",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where JPEGs become pixels; gpu, where there is one, spares the workers",
    )


@dataclass(frozen=True)
class Sample:
    """What a worker sends for one image: V views and where they come from, as in `utils.batch.Batch`."""

    views: list[Tensor]
    """V tensors (3, S, S) uint8; none before they are cut."""
    crops: Tensor
    flips: Tensor
    turns: Tensor
    color: Tensor
    index: int
    """The image's number in the dataset."""
    unreadable: tuple[str, ...]
    source: Source | None = None
    """The image instead of its views."""


class SceneDataset:
    """The views of a list of image files, drawn from (seed, epoch, image number, view) and nothing else.

    An index counts on over the epochs: index i is image `i % len` in epoch `i // len`. With `send_sources` the views
    are only drawn, and their images are sent along for `data.decode.decode_views` to cut them from.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        recipes: tuple[ViewRecipe, ...],
        seed: int,
        send_sources: bool = False,
    ):
        self.root, self.recipes, self.seed, self.send_sources = root, recipes, seed, send_sources
        # One block of bytes: forked workers share it, others receive it quickly.
        self.files = np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """Index -> the views of its image, or of the next one that can be read."""
        epoch, number = divmod(int(index), len(self))
        if self.send_sources:
            source, number, unreadable = self._read(number, read_source, _BLACK_SOURCE)
            drawn = draw_views(source.size, self.recipes, self.seed, epoch, number)
            return Sample(*drawn, index=number, unreadable=tuple(unreadable), source=source)
        image, number, unreadable = self._read(number, _read_image, _BLACK)
        drawn = make_views(image, self.recipes, self.seed, epoch, number)
        return Sample(*drawn, index=number, unreadable=tuple(unreadable))

    def plain(self, count: int, size: int) -> Tensor:
        """The centers of the first `count` images as they are: (count, 3, size, size) uint8."""
        images = (self._read(number, _read_image, _BLACK)[0] for number in range(min(count, len(self))))
        return torch.stack([center_view(image, size) for image in images])

    def _read(self, number: int, read: Callable[[Path], _Read], black: _Read) -> tuple[_Read, int, list[str]]:
        """Image `number` or the next readable one, which number that is, and the files that could not be read.

        If many in a row cannot, it is the black one; the run, which counts them, stops at its next report.
        """
        unreadable: list[str] = []
        for substitute in range(number, number + _TRIES):
            substitute %= len(self)
            path = self.root / os.fsdecode(self.files[substitute])
            try:
                return read(path), substitute, unreadable
            except Exception:  # damaged files make Pillow's decoders raise nearly anything
                unreadable.append(str(path))
        return black, number, unreadable


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def build_dataset(args: argparse.Namespace) -> SceneDataset:
    """The data set that `args.dataset` and `args.data_dir` name, with SlotCon's views, which SlotFA shares.

    Raises:
        UsageError: a folder is missing or has no images.
    """
    root = Path(args.data_dir)
    if args.dataset == "demo":
        if distributed.local_rank() == 0:
            make_demo(root / "demo", args.seed)
        distributed.barrier()
        root = make_demo(root / "demo", args.seed)
    elif not root.is_dir():
        raise UsageError(f"--data-dir {root}: no such folder")
    files = sorted(file for folder in FOLDERS[args.dataset] for file in _images(root, folder, args.dataset))
    recipes = slotcon_views(args.image_size, args.min_scale)
    # Commands that only look at images have no --decode.
    return SceneDataset(root, files, recipes, args.seed, send_sources=getattr(args, "decode", "cpu") == "gpu")


def _images(root: Path, folder: str, dataset: str) -> list[str]:
    """Image files at any depth below `root / folder`, relative to `root`."""
    if not (root / folder).is_dir():
        raise UsageError(f"--data-dir {root}: --dataset {dataset} wants {folder}/ in it, and there is none")
    files = list(_walk(root, folder))
    if not files:
        raise UsageError(f"--data-dir {root / folder}: no images in it (looked for {' '.join(SUFFIXES)})")
    return files


def _walk(root: Path, folder: str) -> Iterator[str]:
    for entry in os.scandir(root / folder):
        inside = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            yield from _walk(root, inside)
        elif entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
            yield inside
