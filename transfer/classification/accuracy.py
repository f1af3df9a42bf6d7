"""Top-1 and top-5 accuracy on validation images, each of which counts once on any number of processes."""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from transfer.classification.labeled_images import LabeledBatch, ValidationImages, collate
from utils import distributed
from utils.device import amp_dtype, loader_workers


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in percent."""

    top1: float
    top5: float
    """The label is among the five largest logits, or among all of them if there are fewer classes."""
    num_images: int
    unreadable: list[str]
    """Files that cannot be read; they count as wrong."""

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} % of {self.num_images} images"


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Count how many labels (B,) are the largest of the logits (B, classes), and among the five largest: (2,).

    A row with a logit that is not a number counts as wrong.
    """
    matches = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    matches &= ~logits.isnan().any(dim=1, keepdim=True)
    return torch.stack([matches[:, 0].sum(), matches.sum()])


@torch.no_grad()
def evaluate(model: nn.Module, images: ValidationImages, args: argparse.Namespace, device: torch.device) -> Accuracy:
    """Return the accuracy of a model, in evaluation mode, on all images; each process takes its share of them."""
    ranks, dtype = distributed.world_size(), amp_dtype(args)
    loader: DataLoader[LabeledBatch] = DataLoader(
        Subset(images, range(distributed.rank(), len(images), ranks)),  # type: ignore[arg-type]
        batch_size=max(1, args.batch_size // ranks),
        num_workers=loader_workers(args.num_workers),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    training, unreadable = model.training, []
    model.eval()
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    for batch in loader:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(batch.images.to(device, non_blocking=True))
        correct += count_correct(logits, batch.labels.to(device))
        unreadable += batch.unreadable
    model.train(training)
    top1, top5 = (100 * count / len(images) for count in distributed.all_reduce_sum(correct).tolist())
    gathered = distributed.all_gather_object(unreadable)
    return Accuracy(top1, top5, len(images), sorted(name for names in gathered for name in names))
