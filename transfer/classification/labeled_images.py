"""Datasets that read labeled images for training and validation, and their batches."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.datasets import MAX_UNREADABLE_IN_A_ROW, read_or_substitute
from data.views import rgb_pixels
from transfer.classification.labeled_files import LabeledFiles
from utils.seeds import derive_seed

NO_LABEL = -1
"""The label of an image that cannot be read, which equals no prediction."""

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class LabeledImage:
    """What a worker sends for one image."""

    image: Tensor
    """(3, S, S), normalized."""
    label: int
    index: int
    unreadable: tuple[str, ...]
    """Files that could not be read."""


@dataclass(frozen=True)
class LabeledBatch:
    """The images of a batch, with the fields of `LabeledImage`."""

    images: Tensor
    """(B, 3, S, S)."""
    labels: Tensor
    """(B,) int64."""
    index: Tensor
    """(B,) int64."""
    unreadable: tuple[str, ...]

    def pin_memory(self) -> "LabeledBatch":
        """Copy to pinned memory, as `torch.utils.data.DataLoader` asks for."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: Sequence[LabeledImage]) -> LabeledBatch:
    """Stack the samples of a batch."""
    return LabeledBatch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([sample.index for sample in samples]),
        tuple(name for sample in samples for name in sample.unreadable),
    )


class ValidationImages(Dataset[LabeledImage]):
    """The images of a split; one that cannot be read is black and has the label `NO_LABEL`."""

    def __init__(self, files: LabeledFiles, transform: Transform):
        self.root, self.transform = files.root, transform
        # Arrays instead of lists: forked workers share their memory.
        self.files = np.array([os.fsencode(file) for file in files.files])
        self.labels = np.array(files.labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabeledImage:
        return self._label(index, tries=1)

    def _label(self, index: int, tries: int) -> LabeledImage:
        """Return an image, or the next readable one of `tries`, with its label; else a black one without a label."""
        black = Image.new("RGB", (256, 256))
        image, number, unreadable = read_or_substitute(self.root, self.files, index, _read_image, black, tries)
        label = NO_LABEL if len(unreadable) == tries else int(self.labels[number])
        return LabeledImage(self.transform(image), label, index, tuple(unreadable))


class TrainingImages(ValidationImages):
    """The images of a split, augmented by random numbers that depend on (seed, epoch, image number) alone.

    Indices continue over epochs: index i is image `i % len` in epoch `i // len`. In the place of an image that cannot
    be read stands the next one, with its own label; after `MAX_UNREADABLE_IN_A_ROW` of them a black image with the
    label `NO_LABEL`.
    """

    def __init__(self, files: LabeledFiles, transform: Transform, seed: int):
        super().__init__(files, transform)
        self.seed = seed

    def __getitem__(self, index: int) -> LabeledImage:
        epoch, number = divmod(index, len(self))
        seed_generators(self.seed, epoch, number)
        return self._label(number, MAX_UNREADABLE_IN_A_ROW)


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return Image.fromarray(rgb_pixels(image))


def seed_generators(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch, all of which timm's augmentation uses, by a tuple of numbers."""
    seed = derive_seed(*key) % 2**32  # the largest range that NumPy takes
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
