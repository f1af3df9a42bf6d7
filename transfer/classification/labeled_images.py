"""Datasets that read labeled images for training and validation, and their batches."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.views import rgb_pixels
from transfer.classification.labeled_files import LabeledFiles

NO_LABEL = -1
"""The label of an image that cannot be read, which equals no prediction."""
MAX_UNREADABLE_IN_A_ROW = 20

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
        image, unreadable = self._read(index)
        label = NO_LABEL if unreadable else int(self.labels[index])
        return LabeledImage(self.transform(image), label, index, unreadable)

    def _read(self, number: int) -> tuple[Image.Image, tuple[str, ...]]:
        """Return an image, and nothing; or a black image, and the name of the file that cannot be read."""
        path = self.root / os.fsdecode(self.files[number])
        try:
            with Image.open(path) as image:
                return Image.fromarray(rgb_pixels(image)), ()
        except Exception:  # damaged files make the decoders of Pillow raise nearly any exception
            return Image.new("RGB", (256, 256)), (str(path),)


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
        unreadable: list[str] = []
        for substitute in range(number, number + MAX_UNREADABLE_IN_A_ROW):
            substitute %= len(self)
            image, failed = self._read(substitute)
            unreadable += failed
            if not failed:
                break
        label = NO_LABEL if failed else int(self.labels[substitute])
        return LabeledImage(self.transform(image), label, number, tuple(unreadable))


def seed_generators(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch, all of which timm's augmentation uses, by a tuple of numbers."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
