"""Apply a trained model to the center crops of images, batch by batch."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.datasets import MultiViewDataset
from data.views import Box, center_view, central_crop
from transfer.slot_model import SlotModel
from utils.errors import UsageError
from utils.visualization import normalize


@dataclass(frozen=True)
class CroppedImage:
    """The largest central square of an image, resampled."""

    index: int
    pixels: Tensor | None
    """(3, S, S) uint8; None if the image cannot be read."""
    box: Box
    """The square in pixels of the image."""


class CenterCrops(Dataset[CroppedImage]):
    """Dataset of the center crops of images, `size` x `size` pixels each."""

    def __init__(self, images: MultiViewDataset, size: int):
        self.root, self.files, self.size = images.root, images.files, size

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the path of an image below the dataset's folder for display; undecodable bytes are replaced."""
        return bytes(self.files[index]).decode(errors="replace")

    def __getitem__(self, index: int) -> CroppedImage:
        path = self.root / os.fsdecode(self.files[index])
        try:
            with Image.open(path) as image:
                return CroppedImage(int(index), center_view(image, self.size), central_crop(image.size, (1, 1)))
        except Exception:  # damaged files make the decoders of Pillow raise nearly any exception
            return CroppedImage(int(index), None, (0, 0, 0, 0))


class ExtractedBatch(NamedTuple):
    """B images with the outputs of the model; `indices`, `images` and `boxes` are on the CPU."""

    indices: Tensor
    """(B,) int64, the indices of the images in the dataset."""
    images: Tensor
    """(B, 3, S, S) uint8."""
    boxes: Tensor
    """(B, 4) int64: the crops as x0 y0 x1 y1 in pixels of the images."""
    projections: Tensor
    """(B, D, h, w)."""
    scores: Tensor
    """(B, K, h, w) float32, cosine similarities."""


@dataclass
class FeatureExtractor:
    """Apply a model to center crops, batch by batch, on one device."""

    model: SlotModel
    crops: CenterCrops
    device: torch.device
    batch_size: int
    num_workers: int

    def extract(self, indices: Sequence[int], description: str) -> Iterator[ExtractedBatch]:
        """Yield the outputs for the images `indices` in this order; unreadable images are reported and left out.

        Args:
            indices: of images in `crops`.
            description: the label of the progress bar.

        Raises:
            UsageError: no image can be read, or a batch does not fit into the memory of the GPU.
        """
        workers = min(self.num_workers, len(indices) // self.batch_size)
        loader = DataLoader(Subset(self.crops, indices), self.batch_size, num_workers=workers, collate_fn=list)
        num_readable = 0
        with tqdm(total=len(indices), unit="image", desc=description, disable=not sys.stderr.isatty()) as bar:
            for crops in loader:
                readable = [crop for crop in crops if crop.pixels is not None]
                for crop in crops:
                    if crop.pixels is None:
                        path = self.crops.root / self.crops.name(crop.index)
                        tqdm.write(f"skipped, cannot be read: {path}", file=sys.stderr)
                if readable:
                    yield self._apply_model(readable)
                num_readable += len(readable)
                bar.update(len(crops))
        if not num_readable:
            first = self.crops.root / self.crops.name(indices[0])
            raise UsageError(f"--data-dir: none of {len(indices)} images can be read, such as {first}")

    def _apply_model(self, crops: list[CroppedImage]) -> ExtractedBatch:
        images = torch.stack([crop.pixels for crop in crops if crop.pixels is not None])
        try:
            with torch.no_grad():
                projections, scores = self.model(normalize(images / 255).to(self.device))
        except torch.cuda.OutOfMemoryError:
            raise UsageError(f"--batch-size {self.batch_size}: out of GPU memory; use a smaller one") from None
        indices, boxes = torch.tensor([crop.index for crop in crops]), torch.tensor([crop.box for crop in crops])
        return ExtractedBatch(indices, images, boxes, projections, scores)
