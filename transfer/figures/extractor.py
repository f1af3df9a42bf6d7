"""Apply a trained model to the center crops of images, batch by batch."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.datasets import MultiViewDataset
from data.views import Box, center_view, central_crop
from transfer.figures.vit_attention import EncodedImages
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


class CropBatch(NamedTuple):
    """B center crops, on the CPU."""

    indices: Tensor
    """(B,) int64, the indices of the images in the dataset."""
    images: Tensor
    """(B, 3, S, S) uint8."""
    boxes: Tensor
    """(B, 4) int64: the crops as x0 y0 x1 y1 in pixels of the images."""


class SlotBatch(NamedTuple):
    """B images as in `CropBatch`, with the outputs of a slot model."""

    indices: Tensor
    images: Tensor
    boxes: Tensor
    projections: Tensor
    """(B, D, h, w)."""
    scores: Tensor
    """(B, K, h, w) float32, cosine similarities."""


class FeatureBatch(NamedTuple):
    """B images as in `CropBatch`, with the outputs of an encoder."""

    indices: Tensor
    images: Tensor
    boxes: Tensor
    features: Tensor
    """(B, C, h, w)."""
    attention: Tensor | None
    """(B, heads, h, w), attention of the class token to the patches; None for encoders without a class token."""


Outputs = TypeVar("Outputs")


@dataclass
class _Extractor(Generic[Outputs]):
    """Apply a model to center crops, batch by batch, on one device."""

    model: Callable[[Tensor], Outputs]
    crops: CenterCrops
    device: torch.device
    batch_size: int
    num_workers: int

    def _apply(self, indices: Sequence[int], description: str) -> Iterator[tuple[CropBatch, Outputs]]:
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
                    batch = _stack(readable)
                    yield batch, self._apply_model(batch.images)
                num_readable += len(readable)
                bar.update(len(crops))
        if not num_readable:
            first = self.crops.root / self.crops.name(indices[0])
            raise UsageError(f"--data-dir: none of {len(indices)} images can be read, such as {first}")

    def _apply_model(self, images: Tensor) -> Outputs:
        try:
            with torch.no_grad():
                return self.model(normalize(images / 255).to(self.device))
        except torch.cuda.OutOfMemoryError:
            raise UsageError(f"--batch-size {self.batch_size}: out of GPU memory; use a smaller one") from None


def _stack(crops: Sequence[CroppedImage]) -> CropBatch:
    images = torch.stack([crop.pixels for crop in crops if crop.pixels is not None])
    return CropBatch(torch.tensor([crop.index for crop in crops]), images, torch.tensor([crop.box for crop in crops]))


class SlotExtractor(_Extractor[tuple[Tensor, Tensor]]):
    """Apply a slot model, which maps images to projections and scores, to center crops."""

    def extract(self, indices: Sequence[int], description: str) -> Iterator[SlotBatch]:
        """Yield the outputs for the images `indices` in this order; unreadable images are reported and left out.

        Args:
            indices: of images in `crops`.
            description: the label of the progress bar.

        Raises:
            UsageError: no image can be read, or a batch does not fit into the memory of the GPU.
        """
        for crops, (projections, scores) in self._apply(indices, description):
            yield SlotBatch(*crops, projections, scores)


class FeatureExtractor(_Extractor[EncodedImages]):
    """Apply an encoder, by `vit_attention.encode`, to center crops."""

    def extract(self, indices: Sequence[int], description: str) -> Iterator[FeatureBatch]:
        """Yield features and attention, as `SlotExtractor.extract` yields projections and scores."""
        for crops, (features, attention) in self._apply(indices, description):
            yield FeatureBatch(*crops, features, attention)
