"""The contract of a pre-training method."""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from models.backbones import Encoder
from models.ema import copy_and_freeze, ema_update
from utils.batch import Batch
from utils.meter import Monitor
from utils.view_recipes import ViewRecipe, two_view_recipes

VIT_OPTIMIZATION: Mapping[str, Any] = {
    "optimizer": "adamw",
    "base_lr": 5e-4,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "warmup_epoch": 10,
    "warmup_multiplier": math.inf,
    "clip_grad": 3.0,
}
"""The optimization of ViTs in GTSA (arXiv 2304.08014), which is that of DINO (arXiv 2104.14294)."""


class Method(nn.Module, ABC):
    """A student, an EMA teacher, and the loss between them.

    A method holds no step counter, schedule, logger or world size: the step comes with the batch, and collectives go
    through `utils.distributed`.
    """

    recipe: ClassVar[Mapping[str, Any]] = {}
    """Published values of shared arguments (optimizer, learning rate, epochs, ...), which become their defaults."""
    vit_recipe: ClassVar[Mapping[str, Any]] = {}
    """Values that replace those of `recipe` where `--arch` is a ViT."""
    view_sizes: ClassVar[tuple[str, ...]] = ("image_size",)
    """The arguments that set the sides of the views, which the encoder has to accept."""
    compiled: ClassVar[tuple[str, ...]] = ()
    """Names of the methods that `--compile` compiles: fixed shapes, tensors in and out, no host reads."""
    encoder_q: Encoder
    """The student encoder: images (B, 3, H, W) -> feature map (B, C, h, w)."""
    encoder_k: Encoder
    """The teacher encoder."""

    @staticmethod
    @abstractmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        """Add the arguments of this method, `--teacher-momentum` among them, with their published values."""

    @staticmethod
    def view_recipes(args: argparse.Namespace) -> tuple[ViewRecipe, ...]:
        """Return the recipes of the views that the workers make of an image."""
        return two_view_recipes(args.image_size, args.min_scale)

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Returns:
            `loss`, a scalar with gradient, and detached scalars to log, named with their group (`loss/group`).
        """

    def student_teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the parts `NAME_q` of the student that have a counterpart `NAME_k` in the teacher, and that."""
        parts = dict(self.named_children())
        counterparts = {name: f"{name[:-2]}_k" for name in parts if name.endswith("_q")}
        return [(parts[name], parts[other]) for name, other in counterparts.items() if other in parts]

    def initialize_teacher(self) -> None:
        """Copy the student to the teacher, and exclude the teacher from the gradient; called by the constructor."""
        for student, teacher in self.student_teacher_pairs():
            copy_and_freeze(student, teacher)

    def update_teacher(self, momentum: float) -> None:
        """Update the EMA teacher; called once per optimizer step, before the forward."""
        for student, teacher in self.student_teacher_pairs():
            ema_update(student, teacher, momentum)

    def notes(self, epochs: int) -> list[str]:
        """Return messages for the user about a run of so many epochs."""
        return []

    def build_monitor(self, steps_per_epoch: int) -> Monitor | None:
        """Build the monitor that accumulates statistics over steps; None if the method has none."""
        return None

    def slot_maps(self, images: Tensor) -> Tensor | None:
        """Return the teacher's prototype scores (B, K, h, w) for normalized images (B, 3, H, W); None without slots."""
        return None
