"""A trained model looks at a list of images, batch by batch."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.datasets import SceneDataset
from data.views import central_crop, center_view
from utils.errors import UsageError
from utils.visualization import normalize

Model = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalized images (B, 3, S, S) -> projections (B, D, h, w) and scores (B, K, h, w)."""


class Square(NamedTuple):
    """The center of image `number`; None where it cannot be read."""

    number: int
    pixels: Tensor | None
    """(3, S, S) uint8."""
    crop: tuple[int, int, int, int]
    """x0 y0 x1 y1 in pixels of the image."""


class Squares(Dataset[Square]):
    """Image number -> the image's center square, resampled to `size` pixels."""

    def __init__(self, images: SceneDataset, size: int):
        self.root, self.files, self.size = images.root, images.files, size

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        """The file of image `number` below the data set's folder, for people: bytes that are no text are replaced."""
        return bytes(self.files[number]).decode(errors="replace")

    def __getitem__(self, number: int) -> Square:
        path = self.root / os.fsdecode(self.files[number])
        try:
            with Image.open(path) as image:
                crop = central_crop(image.size, (1, 1))
                return Square(int(number), center_view(image, self.size), (crop[0], crop[1], crop[2], crop[3]))
        except Exception:  # damaged files make Pillow's decoders raise nearly anything
            return Square(int(number), None, (0, 0, 0, 0))


class Seen(NamedTuple):
    """B images, and what the model sees in them."""

    numbers: Tensor
    """(B,) int64, the images' numbers, on the host."""
    images: Tensor
    """(B, 3, S, S) uint8, on the host."""
    crops: Tensor
    """(B, 4) int64: x0 y0 x1 y1 of the square in pixels of the image, on the host."""
    projections: Tensor
    """(B, D, h, w)."""
    scores: Tensor
    """(B, K, h, w) float32, cosines."""


@dataclass
class Observer:
    """A model and the images that it can look at."""

    model: Model
    squares: Squares
    device: torch.device
    batch_size: int
    workers: int

    def look(self, numbers: Sequence[int], what: str) -> Iterator[Seen]:
        """See the images `numbers` in that order, without those that cannot be read.

        Raises:
            UsageError: not one of them can be read, or a batch does not fit into the device's memory.
        """
        loader = DataLoader(
            Subset(self.squares, numbers),
            self.batch_size,
            num_workers=min(self.workers, len(numbers) // self.batch_size),
            collate_fn=list,
        )
        seen = 0
        with tqdm(total=len(numbers), unit="image", desc=what, disable=not sys.stderr.isatty()) as bar:
            for squares in loader:
                readable = [square for square in squares if square.pixels is not None]
                self._name(square.number for square in squares if square.pixels is None)
                if readable:
                    yield self._see(readable)
                seen += len(readable)
                bar.update(len(squares))
        if not seen:
            first = self.squares.root / self.squares.name(numbers[0])
            raise UsageError(f"--data-dir: none of {len(numbers)} images can be read, such as {first}")

    def _see(self, squares: list[Square]) -> Seen:
        images = torch.stack([square.pixels for square in squares if square.pixels is not None])
        try:
            with torch.no_grad():
                projections, scores = self.model(normalize(images / 255).to(self.device))
        except torch.cuda.OutOfMemoryError:
            raise UsageError(f"--batch-size {self.batch_size}: more than the GPU's memory holds; use less") from None
        numbers = torch.tensor([square.number for square in squares])
        return Seen(numbers, images, torch.tensor([square.crop for square in squares]), projections, scores)

    def _name(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            tqdm.write(f"skipped, cannot be read: {self.squares.root / self.squares.name(number)}", file=sys.stderr)
