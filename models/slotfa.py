"""SlotFA: SlotCon with slot-level feature augmentation, against which the student's grouping has to be stable."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from models.grouping import prototype_scores
from models.slot_augmentation import AugmentationNoise, SlotAugmentation
from models.slotcon import SlotCon, ViewFeatures
from utils.batch import Batch
from utils.config import at_least, between


class SlotFA(SlotCon):
    """SlotCon plus the grouping loss between an augmented projection and the same teacher.

    `loss = lambda (L_g + w L_aug) + (1 - lambda) L_c`. The defaults are the *paper* preset: lambda 1, gradient of L_aug
    to the features, none to the prototypes.
    """

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        """Add the arguments of SlotCon and those of SlotFA."""
        SlotCon.add_arguments(group)
        group.set_defaults(group_loss_weight=1.0)
        add, non_negative = group.add_argument, at_least(0, float)
        add("--fa-sigma-scale", type=non_negative, default=1.0, help="standard deviation of the scales around 1")
        add("--fa-sigma-shift", type=non_negative, default=1.0, help="standard deviation of the shifts around 0")
        add("--fa-loss-weight", type=non_negative, default=1.0, help="weight w of the augmented grouping loss")
        add("--fa-slot-ratio", type=between(0, 1), default=1.0, help="share of the occupied slots to augment")
        add(
            "--fa-level",
            choices=("projection", "encoder"),
            default="projection",
            help="feature map to augment: the projection, or the map of the encoder",
        )
        add(
            "--fa-gradient",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="let the augmented loss train the features (the released code does not)",
        )
        add("--fa-train-prototypes", action="store_true", help="let the augmented loss train the prototypes")

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.loss_weights["loss/augmented"] = args.group_loss_weight * args.fa_loss_weight
        self.level, self.gradient, self.train_prototypes = args.fa_level, args.fa_gradient, args.fa_train_prototypes
        width = args.dim_out if self.level == "projection" else self.encoder_q.width
        self.augmentation = SlotAugmentation(
            args.num_prototypes, width, args.fa_sigma_scale, args.fa_sigma_shift, args.fa_slot_ratio
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of two views of B images."""
        teacher = [self.encode_teacher(view) for view in batch.views]
        student = [self.encode_student(view) for view in batch.views]
        noise = self.draw_noise(batch)  # outside compiled code, which takes no generators
        losses, statistics, new_center = self.compute_losses(batch, student, teacher, self.center.clone(), noise)
        self.center.copy_(new_center)
        return self.weight_losses(losses) | statistics

    def draw_noise(self, batch: Batch) -> list[AugmentationNoise]:
        """Draw the noise of each view of a step."""
        if not self.loss_weights["loss/augmented"]:
            return []
        draw, device = self.augmentation.draw_noise, self.center.device
        return [draw(batch.seed, batch.step, view, device) for view in range(len(batch.views))]

    def compute_losses(
        self,
        batch: Batch,
        student: list[ViewFeatures],
        teacher: list[ViewFeatures],
        center: Tensor,
        noise: Sequence[AugmentationNoise] = (),
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Add the augmented grouping loss to the terms of SlotCon."""
        losses, statistics, new_center = super().compute_losses(batch, student, teacher, center)
        if self.loss_weights["loss/augmented"]:
            assignments = [view.scores.argmax(dim=1) for view in student]
            with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
                scores = [self.augmented_scores(*of_view) for of_view in zip(student, assignments, noise)]
                teacher_scores = [view.scores for view in teacher]
                losses["loss/augmented"] = self.grouping_loss(batch, scores, teacher_scores, center)
            moved = [new.argmax(dim=1) != old for new, old in zip(scores, assignments)]
            statistics["slots/assignments_moved"] = torch.stack(moved).float().mean()
        return losses, statistics, new_center

    def augmented_scores(self, view: ViewFeatures, assignment: Tensor, noise: AugmentationNoise) -> Tensor:
        """Return the scores (B, K, H, W) of a student view whose slots, (B, H, W) int64, were augmented."""
        source = view.projected if self.level == "projection" else view.encoded
        features = self.augmentation(source, assignment, noise)
        if self.level == "encoder":
            features = self.projector_q(features)
        prototypes = self.grouping_q.slot_embed.weight
        return prototype_scores(features, prototypes if self.train_prototypes else prototypes.detach())
