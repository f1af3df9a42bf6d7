"""Labeled images: which pairs of image and mask a data set has, and what the values of its masks mean."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data import scenes
from data.datasets import SUFFIXES
from transfer.probe import cocostuff
from transfer.probe.scores import VOID
from utils.config import at_least
from utils.errors import UsageError

Pairs = list[tuple[Path, Path]]


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps images and masks, and what the values of a mask are."""

    pairs: Callable[[Path, str], Pairs]
    """Root and `train` or `val` -> pairs, sorted."""
    classes: Sequence[str] = ()
    """Names; empty where the masks alone tell how many there are."""
    first: int = 0
    """The value of the first class; smaller ones are void."""
    void: int = VOID
    """The value of void, beside VOID."""


def _beside(images: str, masks: str, suffix: str = "", cut: str = "") -> Callable[[Path, str], Pairs]:
    """Pairs of two folders (`{split}` in their names), a mask having its image's name less `cut`, plus `suffix`."""

    def pairs(root: Path, split: str) -> Pairs:
        found = []
        top, labels = root / images.format(split=split), root / masks.format(split=split)
        for image in sorted(top.rglob("*")):
            if image.suffix.lower() in SUFFIXES and image.stem.endswith(cut):
                name = image.stem.removesuffix(cut) + suffix + ".png"
                found.append((image, labels / image.parent.relative_to(top) / name))
        return [pair for pair in found if pair[1].exists()]

    return pairs


def _voc(root: Path, split: str) -> Pairs:
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = listed.read_text().split() if listed.exists() else []
    return [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names]


_VOC = "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person"
_CITYSCAPES = (
    "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car truck bus train"
)
_CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"

LAYOUTS = {
    "folder": Layout(_beside("{split}/images", "{split}/masks")),
    "demo": Layout(_beside("{split}/images", "{split}/masks"), scenes.CLASSES),
    "coco-stuff-27": Layout(_beside("{split}2017", "semantic27/{split}2017"), cocostuff.CLASSES),
    "ade20k": Layout(_beside("images/{split}", "annotations/{split}"), [f"class {n}" for n in range(1, 151)], first=1),
    "voc": Layout(_voc, (*_VOC.split(), "pottedplant", "sheep", "sofa", "train", "tvmonitor")),
    "cityscapes": Layout(
        _beside("leftImg8bit/{split}", "gtFine/{split}", "_gtFine_labelTrainIds", "_leftImg8bit"),
        (*_CITYSCAPES.split(), "motorcycle", "bicycle"),
    ),
    "camvid": Layout(_beside("{split}", "{split}annot"), _CAMVID.split(), void=11),
}

_SPLITS = {"ade20k": {"train": "training", "val": "validation"}}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that say which labeled images."""
    group.add_argument("--dataset", choices=tuple(LAYOUTS), default="folder", help="layout of --data-dir")
    group.add_argument(
        "--data-dir", type=Path, required=True, help="the data set; transfer/probe/README.md has layouts"
    )
    group.add_argument(
        "--size", type=at_least(1), default=320, help="short side in pixels, of which the center square is taken"
    )
    group.add_argument("--train-images", type=at_least(1), help="the first so many of the training images (all)")
    group.add_argument("--val-images", type=at_least(1), help="the first so many of the validation images (all)")
    group.add_argument("--val-list", type=Path, help="file of validation images' names, one a line (all)")


class Labeled(Dataset[tuple[Tensor, Tensor]]):
    """One split of a data set: index -> image (3, S, S) uint8 and labels (S, S) int64, VOID for void.

    Raises:
        UsageError: there are no pairs, or, at an index, a file cannot be read, a mask is of another size than its
            image, or has a value that is no class.
    """

    def __init__(self, args: argparse.Namespace, split: str):
        layout = LAYOUTS[args.dataset]
        self.size, self.layout = args.size, layout
        root = scenes.make_demo(args.data_dir / "demo", seed=0) if args.dataset == "demo" else args.data_dir
        self.pairs = layout.pairs(root, _SPLITS.get(args.dataset, {}).get(split, split))
        listed = args.val_list if split == "val" else None
        if listed:
            if not listed.is_file():
                raise UsageError(f"--val-list {listed}: no such file")
            names = {Path(name).stem for name in listed.read_text(errors="replace").split()}
            self.pairs = [pair for pair in self.pairs if pair[0].stem in names]
            if missing := len(names - {pair[0].stem for pair in self.pairs}):
                raise UsageError(f"--val-list {listed}: {missing} of its {len(names)} images have no image and mask")
        self.pairs = self.pairs[: args.train_images if split == "train" else args.val_images]
        if not self.pairs:
            raise UsageError(
                f"--data-dir {args.data_dir}: no pairs of image and mask of {args.dataset}'s {split} split"
            )
        for path in (path for pair in self.pairs for path in pair):
            if not path.is_file():
                raise UsageError(f"{path}: is listed, and is not there")
        self.classes = tuple(layout.classes) or self._count_classes()

    def _count_classes(self) -> tuple[str, ...]:
        """As many as the largest value in the masks says."""
        largest = max(
            (int(values[values != VOID].max(initial=-1)) for _, mask in self.pairs for values in [_open_mask(mask)])
        )
        return tuple(f"class {number}" for number in range(largest + 1))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[index]
        try:
            picture = Image.open(image).convert("RGB")
        except OSError as error:
            raise UsageError(f"{image}: cannot be read ({error})") from None
        values = _open_mask(mask)
        if values.shape[::-1] != picture.size:
            sizes = f"{values.shape[1]} x {values.shape[0]}, its image {picture.width} x {picture.height}"
            raise UsageError(f"{mask}: is {sizes}; a mask is of its image's size")
        first, void = self.layout.first, self.layout.void
        labels = np.where((values == VOID) | (values == void) | (values < first), VOID, values - first)
        if (wrong := (labels != VOID) & (labels >= len(self.classes))).any():
            known = f"0 to {len(self.classes) - 1 + first}, or {VOID}"
            raise UsageError(f"{mask}: holds the value {values[wrong].max()}; {len(self.classes)} classes are {known}")
        return _square(picture, labels, self.size)


def _open_mask(path: Path) -> NDArray[np.int64]:
    """(H, W) values of a mask of one channel, or of a palette's indices."""
    try:
        values = np.array(Image.open(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if values.ndim != 2:
        raise UsageError(f"{path}: has {values.shape[-1]} channels; a mask has one, of class indices")
    if values.max(initial=0) > VOID:
        raise UsageError(f"{path}: holds the value {values.max()}; classes are 0 to {VOID - 1}, and {VOID} is void")
    return values.astype(np.int64)


def _square(picture: Image.Image, labels: NDArray[np.int64], size: int) -> tuple[Tensor, Tensor]:
    """The center square of what is `size` pixels high or wide: bicubic for the image, nearest for the labels."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    box = (left, top, left + size, top + size)
    image = picture.resize((width, height), Image.Resampling.BICUBIC).crop(box)
    mask = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST).crop(box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(mask)).long()
