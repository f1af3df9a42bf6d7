"""The records that travel from the workers to a method: the views of one image, and of a batch."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet mean and standard deviation of RGB levels in 0..1, by which views are normalized."""

_ON_HOST: dict[str, Any] = {"on_host": True}


@dataclass
class ViewRecord:
    """V views of an image and how each was made; in a `Batch` every tensor has a leading dimension B.

    A new property of a view is one more field here: stacking into batches and copying to the device go over all
    fields that are tensors or lists of tensors.
    """

    views: list[Tensor]
    """V tensors (3, S_v, S_v): uint8 from the workers, normalized float32 once colored; empty before decoding."""
    crops: Tensor
    """(V, 4) float32: x0 y0 x1 y1 of each crop in pixels of the source image."""
    flips: Tensor
    """(V,) bool: flipped horizontally after cropping."""
    rotations: Tensor
    """(V,) int64: counter-clockwise quarter turns after the flip."""
    index: Tensor
    """() int64: the number of the image in the dataset."""
    color: Tensor | None = field(default=None, metadata=_ON_HOST)
    """(V, P) float32 on the host: parameters of the color operations (`data.color`); None once applied."""


@dataclass
class EncodedImages:
    """The images of a batch whose views are decoded on the device, in host memory.

    One tensor holds all of them, because every tensor that a worker sends costs a file descriptor.
    """

    data: Tensor
    """(N,) uint8: the concatenated images."""
    shapes: list[tuple[int, ...]]
    """(n,) for a JPEG file of n bytes, (3, H, W) for pixels."""
    names: list[str]
    """The file name of each image."""

    def unpack(self) -> list[Tensor]:
        """Return B uint8 tensors of `shapes`, views of `data`."""
        parts = self.data.split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]


@dataclass
class Batch(ViewRecord):
    """The V views of B images, as the loader yields them and a method takes them.

    All tensors of `ViewRecord` have a leading dimension B. The random numbers of a view are drawn in the worker; the
    random numbers of a method are drawn from `seed` and `step`, which the training loop fills in; only stochastic depth
    draws from torch's generators, which the loop seeds by seed, step, batch and rank.
    """

    unreadable: tuple[str, ...] = ()
    """Files that could not be read; each was replaced by another image of the dataset."""
    encoded: EncodedImages | None = None
    """The images whose views `data.decode.decode_views` has still to cut; None once the views are there."""
    step: int = 0
    """Optimizer step of the run, from 0."""
    epoch: float = 0.0
    """Epochs completed before this step, with their fraction."""
    seed: int = 0
    """Seed of the run."""

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to `device`, without blocking the host where the memory is pinned.

        `color` and `encoded` stay on the host, which reads them.
        """
        # Only copies to a GPU are ordered before their use.
        non_blocking = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, as `torch.utils.data.DataLoader` asks for; `color` and `encoded` stay as they are."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of all tensors on the device until `stream` has done its present work with them."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `function` to every tensor that lives on the device."""
        changes = {
            item.name: _map_tensors(function, getattr(self, item.name))
            for item in fields(ViewRecord)
            if not item.metadata.get("on_host")
        }
        return replace(self, **changes)


def stack_records(records: Sequence[ViewRecord]) -> dict[str, Any]:
    """Stack the fields of B `ViewRecord`s along a new first dimension, for the constructor of `Batch`."""
    return {item.name: _stack([getattr(record, item.name) for record in records]) for item in fields(ViewRecord)}


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return function(value) if isinstance(value, Tensor) else [function(tensor) for tensor in value]


def _stack(values: Sequence[Any]) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    per_view: Iterable[tuple[Tensor, ...]] = zip(*values)
    return [torch.stack(view) for view in per_view]
