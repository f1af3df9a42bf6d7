"""GTSA with loops over views, pairs of views and images: the baseline of `benchmark.py step --reference`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from models.alignment import overlap_boxes
from models.gtsa import GTSA
from models.precision import upcast
from utils.batch import Batch


class PairwiseGTSA(GTSA):
    """Compute the losses of `GTSA`, each view, pair of views and image on its own."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch whose views are rotated and not flipped."""
        teacher = [upcast(self.encode_teacher(view)) for view in batch.views[:2]]
        student = [self.encode_student(view) for view in batch.views]
        predictions = [upcast(views.predictions) for views in student]
        pairs = [(s, t) for s in range(len(student)) for t in range(2) if s != t]
        crop = [_crop_loss(batch, s, t, predictions[s], teacher[t]) for s, t in pairs]
        rotation = [
            F.cross_entropy(upcast(views.logits), batch.rotations[:, number]) for number, views in enumerate(student)
        ]
        losses = {"loss/crop": torch.stack(crop).mean(), "loss/rotation": torch.stack(rotation).mean()}
        if batch.epoch >= self.correspondence_epoch:
            correspondence = [_correspondence_loss(predictions[s], teacher[t]) for s, t in pairs]
            losses["loss/correspondence"] = torch.stack(correspondence).mean()
        loss = torch.stack([self.loss_weights[name] * term for name, term in losses.items()]).sum()
        return {"loss": loss} | {name: term.detach() for name, term in losses.items()}


def _crop_loss(batch: Batch, s: int, t: int, student: Tensor, teacher: Tensor) -> Tensor:
    """Compare view s of the student with view t of the teacher, image by image, on the pixels that both show."""
    cells = 10 if s < 2 else 4
    (boxes_s, intersects), (boxes_t, _) = overlap_boxes(batch, s, t), overlap_boxes(batch, t, s)
    losses = []
    for image in range(len(student)):
        if intersects[image]:
            of_student = _sample(student[image], boxes_s[image], cells)
            of_teacher = _sample(teacher[image], boxes_t[image], cells)
            turns = int(batch.rotations[image, s] - batch.rotations[image, t])
            losses.append(-F.cosine_similarity(of_student, of_teacher.rot90(turns, (1, 2)), dim=0).mean())
    return torch.stack(losses).mean() if losses else student.new_zeros(())


def _sample(features: Tensor, box: Tensor, cells: int) -> Tensor:
    """Sample a map (D, h, w) inside of a box, given in fractions of its sides: (D, cells, cells)."""
    height, width = features.shape[1:]
    scale = box.new_tensor([width, height, width, height])
    return roi_align(features[None], [(box * scale)[None].to(features.dtype)], cells, aligned=True)[0]


def _correspondence_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the patches of both views with their nearest neighbors, image by image."""
    losses = []
    for ours, theirs in zip(student.flatten(2), teacher.flatten(2)):
        cosine = F.normalize(ours, dim=0).T @ F.normalize(theirs, dim=0)
        matches = max(1, min(cosine.shape) // 2)
        losses += [-cosine.amax(dim=dim).topk(matches).values.mean() for dim in (0, 1)]
    return torch.stack(losses).mean()
