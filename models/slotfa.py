"""SlotFA: SlotCon whose student has to recognize its slots after their features were scaled and shifted at random."""

import argparse

import torch
from torch import Tensor

from models.augmentation import Chance, SlotAugmentation
from models.grouping import prototype_scores
from models.slotcon import Seen, SlotCon
from utils.config import at_least, between
from utils.batch import Batch


class SlotFA(SlotCon):
    """SlotCon plus the grouping loss of an augmented projection against the same teacher.

    `loss = lambda (L_g + w L_aug) + (1 - lambda) L_c`. The defaults are the *paper* preset: lambda 1, gradient into the
    features, prototypes detached in the augmented branch.
    """

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        """SlotCon's flags and SlotFA's own, the paper's figure as defaults."""
        SlotCon.add_arguments(parser)
        parser.set_defaults(group_loss_weight=1.0)
        add, positive = parser.add_argument, at_least(0, float)
        add("--fa-sigma-scale", type=positive, default=1.0, help="deviation of the slots' factors around 1")
        add("--fa-sigma-shift", type=positive, default=1.0, help="deviation of the slots' shifts around 0")
        add("--fa-loss-weight", type=positive, default=1.0, help="weight w of the augmented grouping loss")
        add("--fa-slot-ratio", type=between(0, 1), default=1.0, help="share of the occupied slots that are augmented")
        add("--fa-level", choices=("projection", "encoder"), default="projection", help="which map is augmented")
        add(
            "--fa-gradient",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="let the augmented loss train the features (the released code did not)",
        )
        add("--fa-train-prototypes", action="store_true", help="let the augmented loss train the prototypes as well")

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.weights["loss_augmented"] = args.group_loss_weight * args.fa_loss_weight
        self.level, self.gradient, self.train_prototypes = args.fa_level, args.fa_gradient, args.fa_train_prototypes
        width = args.dim_out if self.level == "projection" else self.map_width
        self.augmentation = SlotAugmentation(
            args.num_prototypes, width, args.fa_sigma_scale, args.fa_sigma_shift, args.fa_slot_ratio
        )

    def _chance(self, batch: Batch) -> list[Chance]:
        if not self.weights["loss_augmented"]:
            return []
        views = range(len(batch.views))
        return [self.augmentation.chance(batch.seed, batch.step, view, self.center.device) for view in views]

    def _terms(
        self, batch: Batch, student: list[Seen], teacher: list[Seen], center: Tensor, chance: list[Chance]
    ) -> dict[str, Tensor]:
        terms = super()._terms(batch, student, teacher, center, chance)
        if self.weights["loss_augmented"]:
            slots = [view.scores.argmax(dim=1) for view in student]
            with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
                scores = [self._augmented_scores(*of_view) for of_view in zip(student, slots, chance)]
                terms["loss_augmented"] = self._distil(batch, scores, teacher, center)
            moved = [new.argmax(dim=1) != old for new, old in zip(scores, slots)]
            terms["assignments_moved"] = torch.stack(moved).float().mean()
        return terms

    def _augmented_scores(self, view: Seen, assignment: Tensor, chance: Chance) -> Tensor:
        """Scores (B, K, H, W) of the student's view after the features of each slot (B, H, W) were augmented."""
        source = view.projected if self.level == "projection" else view.encoded
        features = self.augmentation(source, assignment, chance)
        if self.level == "encoder":
            features = self.projector_q(features)
        prototypes = self.grouping_q.slot_embed.weight
        return prototype_scores(features, prototypes if self.train_prototypes else prototypes.detach())
