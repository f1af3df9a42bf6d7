"""What a loader yields and a method takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels, levels 0..1: views are normalized by them."""


@dataclass
class Sources:
    """The images of a batch whose views are still to be cut, on the host.

    One tensor holds them all: every tensor that a worker sends costs a file descriptor.
    """

    data: Tensor
    """(N,) uint8: the images one after another."""
    shapes: list[tuple[int, ...]]
    """(n,) of a JPEG file of n bytes, (3, H, W) of pixels."""
    names: list[str]
    """Their files, as `Batch.unreadable` names them."""

    def images(self) -> list[Tensor]:
        """B tensors uint8 of these shapes, parts of `data`."""
        parts = self.data.split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]


@dataclass
class Batch:
    """B images seen in V views, with the facts that say where every view comes from.

    All chance of a view is drawn in the worker; what depends on time inside a method comes from `step`,
    `epoch` and `seed`, which the loop fills.
    """

    views: list[Tensor]
    """V tensors (B, 3, S_v, S_v): uint8 from the workers, normalized float32 once `photometric` has run; none
    before they are cut from the sources."""
    crops: Tensor
    """(B, V, 4) float32: x0 y0 x1 y1 of each crop in pixels of the source image."""
    flips: Tensor
    """(B, V) bool: mirrored left-right after cropping."""
    turns: Tensor
    """(B, V) int64: counter-clockwise quarter turns after the flip."""
    index: Tensor
    """(B,) int64: the image's number in the dataset."""
    color: Tensor | None = None
    """(B, V, P) float32 on the host: the drawn parameters of the color operations; None once they are applied."""
    unreadable: tuple[str, ...] = ()
    """Files that could not be read; another image of the dataset took the place of each."""
    sources: Sources | None = None
    """What `data.decode.decode_views` cuts the views from; None once they are cut, or where the workers do it."""
    step: int = 0
    epoch: float = 0.0
    seed: int = 0

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            views=[change(view) for view in self.views],
            crops=change(self.crops),
            flips=change(self.flips),
            turns=change(self.turns),
            index=change(self.index),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not block the host.

        `color` stays on the host, where `photometric` reads which images take part in what, and so do the
        `sources`, whose bytes the decoder wants there.
        """
        to_gpu = torch.device(device).type == "cuda"  # only such copies are ordered before their use
        return self._with(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by `torch.utils.data.DataLoader`); not its `sources`,
        which the decoder copies itself."""
        return self._with(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Have the memory of tensors on a GPU outlive what `stream` does with them."""
        for tensor in (*self.views, self.crops, self.flips, self.turns, self.index):
            tensor.record_stream(stream)
