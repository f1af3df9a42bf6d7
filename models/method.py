"""What every method is."""

import argparse
from abc import ABC, abstractmethod

from torch import Tensor, nn

from utils.batch import Batch


class Method(nn.Module, ABC):
    """A student and a momentum teacher, and the loss between them.

    A method holds no step counter, schedule or logger: what depends on time comes with the batch, and what ranks
    exchange goes through `utils.distributed`.
    """

    encoder_q: nn.Module
    """The student's encoder: images (B, 3, H, W) -> map (B, C, h, w)."""
    encoder_k: nn.Module
    """The teacher's."""
    compiled: tuple[str, ...] = ()
    """What `--compile` compiles: methods of fixed shapes, tensors in and tensors out, that read nothing back."""

    @staticmethod
    @abstractmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        """The method's own flags, with the published recipe as defaults; `--teacher-momentum` among them."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, a scalar with gradient, and detached scalars to log.

        A method with slots adds `slot_positions` (K,): how many positions each prototype won.
        """

    @abstractmethod
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student; called once per optimizer step, before the forward."""

    def slot_maps(self, images: Tensor) -> Tensor | None:
        """Scores (B, K, h, w) of normalized images (B, 3, H, W); None for a method without slots."""
        return None
