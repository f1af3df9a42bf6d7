"""What a loader yields and a method takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels, levels 0..1: views are normalised by them."""


@dataclass
class Batch:
    """B images seen in V views, with the facts that say where every view comes from.

    All chance of a view is drawn in the worker; what depends on time inside a method comes from `step`,
    `epoch` and `seed`, which the loop fills.
    """

    views: list[Tensor]
    """V tensors (B, 3, S_v, S_v): uint8 from the workers, normalised float32 once `photometric` has run."""
    crops: Tensor
    """(B, V, 4) float32: x0 y0 x1 y1 of each crop in pixels of the source image."""
    flips: Tensor
    """(B, V) bool: mirrored left-right after cropping."""
    turns: Tensor
    """(B, V) int64: counter-clockwise quarter turns after the flip."""
    index: Tensor
    """(B,) int64: the image's number in the dataset."""
    colour: Tensor | None = None
    """(B, V, P) float32 on the host: the drawn parameters of the colour operations; None once they are applied."""
    unreadable: tuple[str, ...] = ()
    """Files that could not be read; another image of the dataset took the place of each."""
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

        `colour` stays on the host, where `photometric` reads which images take part in what.
        """
        to_gpu = torch.device(device).type == "cuda"  # only such copies are ordered before their use
        return self._with(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by `torch.utils.data.DataLoader`)."""
        return self._with(lambda tensor: tensor.pin_memory())
