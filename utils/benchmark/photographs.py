"""The images that are read: a folder's, or stand-ins of a common photograph's size."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data.datasets import SceneDataset, build_dataset
from data.demo import render_scene


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flags that say which images are read."""
    group.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of photographs; left out, rendered stand-ins"
    )


@contextmanager
def photographs(args: argparse.Namespace, folder: Path | None, count: int = 32) -> Iterator[Path]:
    """`folder`, or where there is none a passing one of `count` rendered JPEGs of 640 x 480 pixels.

    Raises:
        UsageError: a run has no use for the folder.
    """
    if folder is not None:
        folder_dataset(args, folder)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(count):
            picture, _mask = render_scene(0, "train", number, 640, 480)
            Image.fromarray(picture).save(Path(temporary, f"{number:04}.jpg"), quality=90)
        yield Path(temporary)


def folder_dataset(args: argparse.Namespace, folder: Path, images: int = 1) -> SceneDataset:
    """A run's data set over all images below `folder`, taken several times where they are fewer than `images`.

    Raises:
        UsageError: there is no such folder, or no image in it.
    """
    dataset = build_dataset(argparse.Namespace(**{**vars(args), "dataset": "folder", "data_dir": str(folder)}))
    dataset.files = np.tile(dataset.files, -(-images // len(dataset)))
    return dataset


def paths(dataset: SceneDataset, count: int) -> list[Path]:
    """The first `count` files of a data set."""
    return [dataset.root / os.fsdecode(name) for name in dataset.files[:count]]
