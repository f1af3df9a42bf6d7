"""SlotCon (arXiv 2205.15288): semantic grouping and slot contrast."""

import argparse
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from models.alignment import align, overlap_boxes
from models.backbones import build_encoder
from models.grouping import Grouping, ViewSlots, occupied
from models.heads import Projector, SlotPredictor
from models.losses import distillation, slot_contrast
from models.method import VIT_OPTIMIZATION, Method
from models.slot_statistics import SlotMonitor, slot_statistics
from utils.batch import Batch
from utils.config import at_least, between
from utils.distributed import all_gather, all_reduce_mean, rank


class ViewFeatures(NamedTuple):
    """What a network computes from a view."""

    encoded: Tensor
    """(B, C, H, W), the feature map of the encoder."""
    projected: Tensor
    """(B, D, H, W), its projection z."""
    scores: Tensor
    """(B, K, H, W), cosines of the projection with the prototypes."""


class SlotCon(Method):
    """Student (`_q`) and teacher (`_k`), each an encoder, a projector and prototypes; a slot predictor on the student.

    The attribute names are those of the published checkpoints.
    """

    recipe: ClassVar[Mapping[str, Any]] = {
        "dataset": "COCO",
        "arch": "resnet50",
        "image_size": 224,
        "min_scale": 0.08,
        "batch_size": 512,
        "epochs": 800,
        "warmup_epoch": 5,
        "warmup_multiplier": 100,
        "optimizer": "lars",
        "base_lr": 1.0,
        "weight_decay": 1e-5,
        "momentum": 0.9,
    }
    # Ours: the papers train ResNets only.
    vit_recipe: ClassVar[Mapping[str, Any]] = {**VIT_OPTIMIZATION, "drop_path": 0.1}
    compiled: ClassVar[tuple[str, ...]] = ("encode_student", "encode_teacher", "compute_losses")
    center: Tensor

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        """Add the arguments of SlotCon."""
        count, share, temperature = at_least(1), between(0, 1), at_least(1e-3, float)
        add = group.add_argument
        add("--dim-hidden", type=count, default=4096, help="width of the hidden layers of the MLP heads")
        add("--dim-out", type=count, default=256, help="width D of projections and prototypes")
        add("--num-prototypes", type=count, default=256, help="number K of prototypes; 2048 on ImageNet")
        add("--teacher-momentum", type=share, default=0.99, help="initial EMA momentum; a cosine takes it to 1")
        add(
            "--teacher-temp",
            type=temperature,
            default=0.07,
            help="temperature of the teacher's assignment and of the slot attention",
        )
        add("--student-temp", type=temperature, default=0.1, help="temperature of the student's assignment")
        add("--center-momentum", type=share, default=0.9, help="momentum of the center of the teacher's scores")
        add(
            "--group-loss-weight",
            type=share,
            default=0.5,
            help="weight lambda of the grouping loss; the slot contrast has 1 - lambda",
        )
        add("--contrast-temp", type=temperature, default=0.2, help="temperature tau of the slot contrast")

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.teacher_temp, self.student_temp = args.teacher_temp, args.student_temp
        self.center_momentum, self.contrast_temp = args.center_momentum, args.contrast_temp
        self.loss_weights = {"loss/group": args.group_loss_weight, "loss/contrast": 1 - args.group_loss_weight}

        self.encoder_q = build_encoder(args.arch, args.output_stride, args.drop_path)
        self.encoder_k = build_encoder(args.arch, args.output_stride)
        self.projector_q, self.projector_k = (
            Projector(self.encoder_q.width, args.dim_hidden, args.dim_out) for _ in range(2)
        )
        self.grouping_q, self.grouping_k = (
            Grouping(args.num_prototypes, args.dim_out, args.teacher_temp) for _ in range(2)
        )
        self.predictor_slot = SlotPredictor(args.dim_out, args.dim_hidden, args.dim_out)
        self.register_buffer("center", torch.zeros(1, args.num_prototypes))
        if not self.loss_weights["loss/contrast"]:
            self.predictor_slot.requires_grad_(False)  # unused, but part of the published checkpoints
        self.initialize_teacher()

    def build_monitor(self, steps_per_epoch: int) -> SlotMonitor:
        """Build the monitor of the slots."""
        return SlotMonitor(steps_per_epoch)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of two views of B images."""
        teacher = [self.encode_teacher(view) for view in batch.views]
        student = [self.encode_student(view) for view in batch.views]
        # A clone, because activations may be recomputed in the backward, after the center was updated.
        losses, statistics, new_center = self.compute_losses(batch, student, teacher, self.center.clone())
        self.center.copy_(new_center)
        return self.weight_losses(losses) | statistics

    def encode_student(self, view: Tensor) -> ViewFeatures:
        """Encode, project and score a view (B, 3, S, S) with the student."""
        return _encode(view, self.encoder_q, self.projector_q, self.grouping_q)

    @torch.no_grad()
    def encode_teacher(self, view: Tensor) -> ViewFeatures:
        """Encode, project and score a view (B, 3, S, S) with the teacher."""
        return _encode(view, self.encoder_k, self.projector_k, self.grouping_k)

    def compute_losses(
        self, batch: Batch, student: list[ViewFeatures], teacher: list[ViewFeatures], center: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Compute the loss terms whose weight is not 0, the slot statistics, and the new center (1, K)."""
        mean_scores = all_reduce_mean(_mean_scores(teacher))  # asynchronous, overlaps with the losses
        student_scores = [view.scores for view in student]
        teacher_scores = [view.scores for view in teacher]
        losses = {}
        if self.loss_weights["loss/group"]:
            losses["loss/group"] = self.grouping_loss(batch, student_scores, teacher_scores, center)
        if self.loss_weights["loss/contrast"]:
            losses["loss/contrast"] = self.contrast_loss(student, teacher)
        new_center = center.lerp(mean_scores, 1 - self.center_momentum)
        prototypes = self.grouping_k.slot_embed.weight
        statistics = slot_statistics(student_scores, teacher_scores, prototypes, new_center, self.teacher_temp)
        return losses, statistics, new_center

    def weight_losses(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted sum of the loss terms as `loss`, and the detached terms."""
        loss = sum(weight * losses[name] for name, weight in self.loss_weights.items() if weight)
        return {"loss": torch.as_tensor(loss)} | {name: term.detach() for name, term in losses.items()}

    def grouping_loss(
        self, batch: Batch, student_scores: list[Tensor], teacher_scores: list[Tensor], center: Tensor
    ) -> Tensor:
        """Distill the teacher's grouping of each view into the student's of the other, on the pixels of both."""
        directions = []
        for a, b in ((0, 1), (1, 0)):
            boxes_a, intersects = overlap_boxes(batch, a, b)
            boxes_b, _ = overlap_boxes(batch, b, a)
            aligned_student = align(student_scores[a], boxes_a, batch.flips[:, a])
            aligned_teacher = align(teacher_scores[b], boxes_b, batch.flips[:, b])
            temperatures = self.student_temp, self.teacher_temp
            directions.append(distillation(aligned_student, aligned_teacher, center, *temperatures, valid=intersects))
        return directions[0] + directions[1]

    def contrast_loss(self, student: list[ViewFeatures], teacher: list[ViewFeatures]) -> Tensor:
        """Contrast the student's slots of each view with the teacher's slots of the other."""
        student_slots = [self.grouping_q(view.projected, view.scores) for view in student]
        with torch.no_grad():
            teacher_slots = [self.grouping_k(view.projected, view.scores) for view in teacher]
        first = self._contrast_direction(student_slots[0], teacher_slots[1])
        return first + self._contrast_direction(student_slots[1], teacher_slots[0])

    def _contrast_direction(self, student_slots: ViewSlots, teacher_slots: ViewSlots) -> Tensor:
        """Contrast the student's slots of one view with the teacher's slots of the other view.

        An image has at most `min(K, H W)` occupied slots, so this many rows an image hold all keys, and the queries
        next to their positives; a fixed number of rows avoids reading their count from the device.
        """
        is_key = occupied(teacher_slots.scores)
        is_query = is_key & occupied(student_slots.scores)
        rows = min(is_key.shape[1], teacher_slots.scores[0, 0].numel())
        chosen = is_key.float().topk(rows, dim=1).indices
        keys, key_mask = _take_slots(teacher_slots.slots, chosen), is_key.take_along_dim(chosen, dim=1).flatten()
        all_keys, all_key_masks = all_gather(keys), all_gather(key_mask)  # asynchronous, overlap with the predictor
        query_mask = is_query.take_along_dim(chosen, dim=1).flatten()
        queries, query_mask = self.predictor_slot(_take_slots(student_slots.slots, chosen), query_mask)
        positives = torch.arange(len(keys), device=keys.device) + rank() * len(keys)
        return slot_contrast(queries, query_mask, all_keys, all_key_masks, positives, self.contrast_temp)

    @torch.no_grad()
    def slot_maps(self, images: Tensor) -> Tensor:
        """Return the teacher's scores (B, K, h, w) of normalized images (B, 3, H, W), with running statistics."""
        training = self.training
        self.eval()
        scores = self.grouping_k.scores(self.projector_k(self.encoder_k(images)))
        self.train(training)
        return scores


def _encode(view: Tensor, encoder: nn.Module, projector: nn.Module, grouping: Grouping) -> ViewFeatures:
    encoded = encoder(view)
    projected = projector(encoded)
    return ViewFeatures(encoded, projected, grouping.scores(projected))


def _take_slots(slots: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen (B, rows) of slots (B, K, D) as rows (B * rows, D)."""
    return slots.take_along_dim(chosen[:, :, None], dim=1).flatten(0, 1)


@torch.no_grad()
def _mean_scores(views: list[ViewFeatures]) -> Tensor:
    """Return the mean of the scores over views, images and positions: (1, K)."""
    return torch.stack([view.scores.mean(dim=(0, 2, 3)) for view in views]).mean(dim=0, keepdim=True)
