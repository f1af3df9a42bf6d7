"""Find the files of a custom dataset, and check them before a training."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.datasets import SUFFIXES, check_folder
from transfer.probe.labeled_features import LAYOUTS, VOID, Pairs, has_progress_bar
from utils.errors import UsageError


@dataclass(frozen=True)
class LabeledSplit:
    """The files of the training or validation split."""

    masks: Path
    """The folder of the masks."""
    pairs: Pairs
    """Image and mask."""
    num_unlabeled: int
    """Number of images without a mask, which are not used."""


def find_split(dataset: Any) -> LabeledSplit:
    """Find the files of a `FolderDataset`.

    Args:
        dataset: its config, with `data_root` and `split`.

    Raises:
        UsageError: the folder is missing, no image has a mask, or a mask has no image.
    """
    root = Path(dataset.data_root)
    check_folder("data_root", root)
    images, masks = root / dataset.split / "images", root / dataset.split / "masks"
    for folder in (images, masks):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
    pairs = LAYOUTS["folder"].pairs(root, dataset.split)
    if not pairs:
        raise UsageError(f"{images}: no image has a mask of its name in {masks}")
    if unpaired := set(masks.rglob("*.png")) - {mask for _, mask in pairs}:
        raise UsageError(f"{min(unpaired)}: has no image of its name in {images}")
    num_images = sum(path.suffix.lower() in SUFFIXES for path in images.rglob("*"))
    return LabeledSplit(masks, pairs, num_images - len(pairs))


def check_files(train: LabeledSplit, val: LabeledSplit, num_classes: int) -> int:
    """Check that all images and masks can be read, have equal sizes, and hold no other classes than the config's.

    Returns:
        The largest class in the training masks.

    Raises:
        UsageError: naming the first file that is wrong, or a folder of masks with too few classes.
    """
    pairs = [*train.pairs, *val.pairs]
    with ThreadPoolExecutor() as pool:  # Pillow decodes in several threads at once
        checked = pool.map(partial(_largest_class, num_classes=num_classes), pairs)
        bar = tqdm(checked, total=len(pairs), unit="image", desc="checking files", disable=not has_progress_bar())
        largest = list(bar)
    train_largest, val_largest = max(largest[: len(train.pairs)]), max(largest[len(train.pairs) :])
    for masks, value, fewest in ((train.masks, train_largest, 1), (val.masks, val_largest, 0)):
        if value < fewest:
            values = f"void ({VOID})" if value < 0 else f"0 or void ({VOID})"
            raise UsageError(f"{masks}: all pixels are {values}; classes are 0, 1, and so on")
    return train_largest


def _largest_class(pair: tuple[Path, Path], num_classes: int) -> int:
    """Return the largest class in a mask, or -1 if all pixels are void, after checking the mask and its image."""
    image_path, mask_path = pair
    image, mask = _read_image(image_path), _read_image(mask_path)
    values = np.asarray(mask)
    if values.ndim != 2:
        raise UsageError(f"{mask_path}: has {values.shape[-1]} channels; a mask has one, of class indices")
    if mask.size != image.size:
        sizes = f"{mask.width} x {mask.height}, its image {image.width} x {image.height}"
        raise UsageError(f"{mask_path}: is {sizes}; a mask needs the size of its image")
    classes = values[values != VOID]
    largest = int(classes.max()) if classes.size else -1
    if largest >= num_classes:
        valid = f"0 to {num_classes - 1}, or {VOID}"
        raise UsageError(f"{mask_path}: holds the value {largest}; {num_classes} classes are {valid}")
    return largest


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
        return image
    except Exception as error:  # damaged files make the decoders of Pillow raise nearly any exception
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def describe_data(train: LabeledSplit, val: LabeledSplit, num_classes: int) -> str:
    """Return a line with the numbers of images and classes."""
    text = f"{len(train.pairs)} training and {len(val.pairs)} validation images of {num_classes} classes"
    unlabeled = train.num_unlabeled + val.num_unlabeled
    if unlabeled:
        text += f"; {unlabeled} image{'s' * (unlabeled > 1)} without a mask {'are' if unlabeled > 1 else 'is'} left out"
    return text
