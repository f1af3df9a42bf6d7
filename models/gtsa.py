"""GTSA (arXiv 2304.08014): features that follow the geometric transformations of their views."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.alignment import align, pairwise_overlap_boxes
from models.backbones import build_encoder
from models.heads import ConvHead, RotationHead
from models.losses import aligned_cosine, patch_correspondence
from models.method import VIT_OPTIMIZATION, Method
from models.precision import upcast
from utils.batch import Batch
from utils.config import at_least, between
from utils.view_recipes import ColorRecipe, OverlapCondition, ViewRecipe

_GLOBAL, _LOCAL = slice(2), slice(2, None)
"""The global views of a batch, which the teacher sees as well, and the local views."""
_CELLS = (10, 10), (4, 4)
"""Rows and columns of RoIAlign for pairs with a global, and with a local, view of the student."""
_MAX_TRIES = 100
"""Crops drawn under the condition to intersect the global views, before one is drawn without it."""


class StudentOutput(NamedTuple):
    """What the student computes from N views of one size."""

    predictions: Tensor
    """(N, D, h, w), predictions of the teacher's projections."""
    logits: Tensor
    """(N, 4), of the rotations."""


class GTSA(Method):
    """Student (`_q`) and teacher (`_k`), each an encoder and a projector; predictor and rotation head on the student.

    Every global view of the teacher is paired with every other view of the student: 18 pairs of 2 + 8 views.
    """

    recipe: ClassVar[Mapping[str, Any]] = {
        "dataset": "COCO",
        "arch": "vit_small_patch16_224",
        "image_size": 224,
        "min_scale": 0.3,
        "batch_size": 512,
        "epochs": 100,
        **VIT_OPTIMIZATION,
        "clip_grad_per_parameter": True,
    }
    vit_recipe: ClassVar[Mapping[str, Any]] = {"drop_path": 0.1}
    view_sizes: ClassVar[tuple[str, ...]] = ("image_size", "local_size")
    compiled: ClassVar[tuple[str, ...]] = ("encode_student", "encode_teacher", "compute_losses")

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        """Add the arguments of GTSA."""
        count, weight = at_least(1), at_least(0, float)
        add = group.add_argument
        add("--local-size", type=count, default=96, help="side of a local view in pixels")
        add("--local-views", type=count, default=8, help="number of local views")
        add("--dim-hidden", type=count, default=384, help="channels of the projector's blocks")
        add("--dim-out", type=count, default=768, help="channels of projections and predictions")
        add(
            "--teacher-momentum",
            type=between(0, 1),
            default=0.996,
            help="initial EMA momentum; a cosine takes it to 1",
        )
        add("--correspondence-weight", type=weight, default=0.5, help="weight of the patch correspondence loss")
        add(
            "--correspondence-epoch",
            type=at_least(0),
            default=11,
            help="epochs before the patch correspondence loss starts; shorter runs never have it",
        )
        add("--rotation-weight", type=weight, default=0.5, help="weight of the rotation loss")

    @staticmethod
    def view_recipes(args: argparse.Namespace) -> tuple[ViewRecipe, ...]:
        """Return the recipes of two global views and of the local ones, each of which intersects both global ones."""
        color = ColorRecipe(jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.2)
        first = ViewRecipe(
            args.image_size, (args.min_scale, 1.0), color, flip_p=0.0, rotate=True, interpolation="bilinear"
        )
        second = replace(first, overlap=OverlapCondition((0,), 0.02, "image", _MAX_TRIES))
        overlap = OverlapCondition((0, 1), 0.01, "image", _MAX_TRIES)
        local = replace(first, size=args.local_size, scale=(0.1, 0.3), overlap=overlap)
        return first, second, *[local] * args.local_views

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.loss_weights = {
            "loss/crop": 1.0,
            "loss/correspondence": args.correspondence_weight,
            "loss/rotation": args.rotation_weight,
        }
        self.correspondence_epoch = args.correspondence_epoch
        self.encoder_q = build_encoder(args.arch, args.output_stride, args.drop_path)
        self.encoder_k = build_encoder(args.arch, args.output_stride)
        dims = self.encoder_q.width, args.dim_hidden, args.dim_hidden, args.dim_out
        self.projector_q, self.projector_k = (ConvHead(dims, residual=True) for _ in range(2))
        self.predictor = ConvHead((args.dim_out,) * 3, residual=False)
        self.rotation_head = RotationHead(self.encoder_q.width)
        if not args.rotation_weight:
            self.rotation_head.requires_grad_(False)  # it has no gradient then, which DDP expects of all parameters
        self.initialize_teacher()

    def notes(self, epochs: int) -> list[str]:
        """Tell if the run ends before the patch correspondence loss starts."""
        if epochs > self.correspondence_epoch:
            return []
        start = self.correspondence_epoch
        return [f"no patch correspondence loss: it starts after {start} epochs; --correspondence-epoch sets that"]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of the global and the local views of B images."""
        # Views of one size pass a network as one batch, the images of the first view first.
        views = [torch.cat(batch.views[group]) for group in (_GLOBAL, _LOCAL)]
        teacher = self.encode_teacher(views[0])
        student = [self.encode_student(group) for group in views]
        with_correspondence = batch.epoch >= self.correspondence_epoch
        losses, statistics = self.compute_losses(batch, student, teacher, with_correspondence)
        loss = torch.stack([self.loss_weights[name] * term for name, term in losses.items()]).sum()
        return {"loss": loss} | {name: term.detach() for name, term in losses.items()} | statistics

    def encode_student(self, views: Tensor) -> StudentOutput:
        """Encode views (N, 3, S, S) with the student."""
        encoded = self.encoder_q(views)
        return StudentOutput(self.predictor(self.projector_q(encoded)), self.rotation_head(encoded.mean(dim=(2, 3))))

    @torch.no_grad()
    def encode_teacher(self, views: Tensor) -> Tensor:
        """Encode and project views (N, 3, S, S) with the teacher: (N, D, h, w)."""
        return self.projector_k(self.encoder_k(views))

    def compute_losses(
        self, batch: Batch, student: list[StudentOutput], teacher: Tensor, with_correspondence: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the loss terms whose weight is not 0, and the accuracy of the rotation head if it is trained."""
        predictions, statistics = [group.predictions for group in student], {}
        losses = {"loss/crop": self.crop_loss(batch, predictions, teacher)}
        if with_correspondence and self.loss_weights["loss/correspondence"]:
            losses["loss/correspondence"] = self.correspondence_loss(len(batch.index), predictions, teacher)
        if self.loss_weights["loss/rotation"]:
            logits, labels = torch.cat([group.logits for group in student]), _by_view(batch.rotations)
            losses["loss/rotation"] = F.cross_entropy(upcast(logits), labels)
            statistics["rotation/accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        return losses, statistics

    def crop_loss(self, batch: Batch, predictions: list[Tensor], teacher: Tensor) -> Tensor:
        """Compare student and teacher on the pixels that two views share, upright; the mean over the pairs of views."""
        boxes, intersects = pairwise_overlap_boxes(batch)
        teacher_pose = _by_view(batch.flips[:, _GLOBAL]), _by_view(batch.rotations[:, _GLOBAL])
        losses = []
        for group, maps, cells in zip((_GLOBAL, _LOCAL), predictions, _CELLS):
            pose = _by_view(batch.flips[:, group]), _by_view(batch.rotations[:, group])
            of_student = align(maps, _by_view(boxes[:, group, _GLOBAL]), *pose, cells)
            of_teacher = align(teacher, _by_view(boxes[:, _GLOBAL, group]), *teacher_pose, cells)
            of_student, of_teacher = (aligned.unflatten(0, (-1, len(boxes))) for aligned in (of_student, of_teacher))
            valid = intersects[:, group, _GLOBAL].transpose(0, 1)
            losses.append(aligned_cosine(of_student, of_teacher.transpose(0, 2), valid))
        return _mean_over_pairs(losses)

    def correspondence_loss(self, batch_size: int, predictions: list[Tensor], teacher: Tensor) -> Tensor:
        """Bring patches close to their nearest neighbors in the teacher's view; the mean over the pairs of views."""
        targets = _unit_patches(teacher, batch_size)
        losses = []
        for maps in predictions:
            patches = _unit_patches(maps, batch_size)
            with torch.autocast(maps.device.type, enabled=False):
                cosine = torch.einsum("gbdn,tbdm->gtbnm", patches, targets)
            num_matches = max(1, min(cosine.shape[-2:]) // 2)
            losses.append(patch_correspondence(cosine, num_matches).mean(dim=2))
        return _mean_over_pairs(losses)


def _by_view(values: Tensor) -> Tensor:
    """Reorder values (B, V, ...) of V views as their maps are: (V B, ...), the images of the first view first."""
    return values.transpose(0, 1).flatten(0, 1)


def _unit_patches(maps: Tensor, batch_size: int) -> Tensor:
    """Return the normalized patches (V, B, D, h w) of maps (V B, D, h, w)."""
    return F.normalize(upcast(maps), dim=1).flatten(2).unflatten(0, (-1, batch_size))


def _mean_over_pairs(losses: list[Tensor]) -> Tensor:
    """Average losses (G, 2) of groups of student views over all pairs of views but those of a view with itself."""
    pairs = torch.cat(losses)
    own = pairs.diagonal()
    return (pairs.sum() - own.sum()) / (pairs.numel() - own.numel())
