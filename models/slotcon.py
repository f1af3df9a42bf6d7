"""SlotCon (arXiv 2205.15288): semantic grouping and slot contrast, learned together."""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.alignment import align, overlap
from models.augmentation import Chance
from models.backbones import build_encoder
from models.grouping import Grouped, Grouping, occupied
from models.heads import MLP
from models.slot_health import slot_health
from models.losses import distillation, slot_contrast
from models.ema import copy_and_freeze, ema_update
from utils.config import at_least, between
from utils.batch import Batch
from utils.distributed import all_gather, all_reduce_mean, rank
from models.method import Method


class Seen(NamedTuple):
    """A view, as one of the networks sees it."""

    encoded: Tensor
    """(B, C, H, W) the encoder's map."""
    projected: Tensor
    """(B, D, H, W) its projection z."""
    scores: Tensor
    """(B, K, H, W) cosines with the prototypes."""


class SlotCon(Method):
    """Student (`_q`) and teacher (`_k`), each of encoder, projector and prototypes; a slot predictor on the student.

    Attribute names are those of the published checkpoints.
    """

    center: Tensor
    compiled = ("_student_sees", "_teacher_sees", "_judge")

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        """SlotCon's own flags, the published recipe as defaults."""
        count, share, temperature = at_least(1), between(0, 1), at_least(1e-3, float)
        add = parser.add_argument
        add("--dim-hidden", type=count, default=4096, help="width of the MLP heads' hidden layers")
        add("--dim-out", type=count, default=256, help="width D of projections and prototypes")
        add("--num-prototypes", type=count, default=256, help="number K of prototypes; 2048 on ImageNet")
        add("--teacher-momentum", type=share, default=0.99, help="EMA at the start; a half cosine takes it to 1")
        add("--teacher-temp", type=temperature, default=0.07, help="temperature of teacher and attention")
        add("--student-temp", type=temperature, default=0.1, help="temperature of the student")
        add("--center-momentum", type=share, default=0.9, help="momentum of the center of the teacher's scores")
        add("--group-loss-weight", type=share, default=0.5, help="lambda; the slot contrast weighs 1 - lambda")
        add("--contrast-temp", type=temperature, default=0.2, help="temperature tau of the slot contrast")

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.teacher_temp, self.student_temp = args.teacher_temp, args.student_temp
        self.center_momentum, self.contrast_temp = args.center_momentum, args.contrast_temp
        self.weights = {"loss_group": args.group_loss_weight, "loss_contrast": 1 - args.group_loss_weight}

        (self.encoder_q, width), (self.encoder_k, _) = (build_encoder(args.arch, args.output_stride) for _ in range(2))
        self.map_width = width
        self.projector_q, self.projector_k = (MLP(width, args.dim_hidden, args.dim_out, maps=True) for _ in range(2))
        self.grouping_q, self.grouping_k = (
            Grouping(args.num_prototypes, args.dim_out, args.teacher_temp) for _ in range(2)
        )
        self.predictor_slot = MLP(args.dim_out, args.dim_hidden, args.dim_out, maps=False)
        self.register_buffer("center", torch.zeros(1, args.num_prototypes))
        if not self.weights["loss_contrast"]:
            self.predictor_slot.requires_grad_(False)  # it stays for the checkpoint's keys, and does not run
        for student, teacher in self._pairs():
            copy_and_freeze(student, teacher)

    def _pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (self.encoder_q, self.encoder_k),
            (self.projector_q, self.projector_k),
            (self.grouping_q, self.grouping_k),
        ]

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student; called once per optimizer step, before the forward."""
        for student, teacher in self._pairs():
            ema_update(student, teacher, momentum)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Two views of B images -> `loss` with gradient, and detached parts to log."""
        teacher = [self._teacher_sees(view) for view in batch.views]
        student = [self._student_sees(view) for view in batch.views]
        # Of a copy: what the backward computes again must not see the center that has moved since.
        terms, measures, center = self._judge(batch, student, teacher, self.center.clone(), self._chance(batch))
        self.center.copy_(center)
        loss = sum(weight * terms[name] for name, weight in self.weights.items() if weight)
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, **measures}

    def _student_sees(self, view: Tensor) -> Seen:
        return _see(view, self.encoder_q, self.projector_q, self.grouping_q)

    @torch.no_grad()
    def _teacher_sees(self, view: Tensor) -> Seen:
        return _see(view, self.encoder_k, self.projector_k, self.grouping_k)

    def _chance(self, batch: Batch) -> list[Chance]:
        """What a loss draws at random; apart from `_judge`, because compiled code takes no generators."""
        return []

    def _judge(
        self, batch: Batch, student: list[Seen], teacher: list[Seen], center: Tensor, chance: list[Chance]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What follows from the networks' outputs: the terms of the loss, measures to log, and the next center."""
        mean = all_reduce_mean(_mean_scores(teacher))  # under way while the terms are computed
        terms = self._terms(batch, student, teacher, center, chance)
        following = center.lerp(mean, 1 - self.center_momentum)
        found, aims = ([view.scores for view in views] for views in (student, teacher))
        prototypes = self.grouping_k.slot_embed.weight
        return terms, slot_health(found, aims, prototypes, following, self.teacher_temp), following

    def _terms(
        self, batch: Batch, student: list[Seen], teacher: list[Seen], center: Tensor, chance: list[Chance]
    ) -> dict[str, Tensor]:
        """The terms of the loss by name; one of weight 0 is not computed."""
        terms = {}
        if self.weights["loss_group"]:
            terms["loss_group"] = self._distil(batch, [view.scores for view in student], teacher, center)
        if self.weights["loss_contrast"]:
            found = [self.grouping_q(view.projected, view.scores) for view in student]
            with torch.no_grad():
                aims = [self.grouping_k(view.projected, view.scores) for view in teacher]
            terms["loss_contrast"] = self._contrast(found[0], aims[1]) + self._contrast(found[1], aims[0])
        return terms

    @torch.no_grad()
    def slot_maps(self, images: Tensor) -> Tensor:
        """The teacher's scores of normalized images (B, 3, H, W), by running statistics: (B, K, h, w)."""
        training = self.training
        self.eval()
        scores = self.grouping_k.scores(self.projector_k(self.encoder_k(images)))
        self.train(training)
        return scores

    def _distil(self, batch: Batch, student_scores: list[Tensor], teacher: list[Seen], center: Tensor) -> Tensor:
        """Distil the teacher's grouping of each view into the student's of the other, on the pixels that both show."""
        directions = []
        for a, b in ((0, 1), (1, 0)):
            boxes_a, meets = overlap(batch, a, b)
            boxes_b, _ = overlap(batch, b, a)
            aligned_student = align(student_scores[a], boxes_a, batch.flips[:, a])
            aligned_teacher = align(teacher[b].scores, boxes_b, batch.flips[:, b])
            temperatures = self.student_temp, self.teacher_temp
            directions.append(distillation(aligned_student, aligned_teacher, center, *temperatures, valid=meets))
        return directions[0] + directions[1]

    def _contrast(self, student: Grouped, teacher: Grouped) -> Tensor:
        """Slot contrast of the student's slots in one view against the teacher's in the other.

        An image occupies at most `min(K, H W)` slots, so that many rows an image hold all keys, and the queries
        beside their positives; a fixed number of rows spares a look at the device to count them.
        """
        is_key = occupied(teacher.scores)
        is_query = is_key & occupied(student.scores)
        rows = min(is_key.shape[1], teacher.scores[0, 0].numel())
        chosen = is_key.float().topk(rows, dim=1).indices

        def pick(slots: Tensor, real: Tensor) -> Tensor:
            """Slots (B, K, D) -> the chosen rows (B * rows, D), zeros where not real (B, K)."""
            return torch.where(real[:, :, None], slots, 0).take_along_dim(chosen[:, :, None], dim=1).flatten(0, 1)

        keys = pick(teacher.slots, is_key)
        keys_of_all = all_gather(keys)  # under way while the predictor runs
        queries = self.predictor_slot(pick(student.slots, is_query))
        positives = torch.arange(len(keys), device=keys.device) + rank() * len(keys)
        return slot_contrast(queries, keys_of_all, positives, self.contrast_temp)


@torch.no_grad()
def _mean_scores(views: list[Seen]) -> Tensor:
    """Mean of the scores over views, images and positions: (1, K)."""
    return torch.stack([view.scores.mean(dim=(0, 2, 3)) for view in views]).mean(dim=0, keepdim=True)


def _see(view: Tensor, encoder: nn.Module, projector: nn.Module, grouping: Grouping) -> Seen:
    encoded = encoder(view)
    projected = projector(encoded)
    return Seen(encoded, projected, grouping.scores(projected))
