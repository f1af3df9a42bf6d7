"""Statistics of prototypes over many images: their nearest images, and how much each prototype is used."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.grouping import occupied, pool_slots
from transfer.figures.extractor import SlotBatch
from transfer.figures.nearest_images import NearestImages


class PrototypeStats:
    """Nearest images and usage of each prototype over all images that were added.

    An image uses a prototype that has the highest score at some position of the feature map, as in training.
    """

    def __init__(self, prototypes: Tensor, temperature: float, topk: int):
        """Start without images.

        Args:
            prototypes: (K, D).
            temperature: of the softmax over the prototypes.
            topk: number of nearest images to keep for each prototype.
        """
        count, device = len(prototypes), prototypes.device
        self.prototypes, self.temperature = prototypes, temperature
        self.nearest = NearestImages(count, topk, device)
        self.num_images = 0
        self.image_counts = torch.zeros(count, dtype=torch.int64, device=device)
        """(K,): number of images that use each prototype."""
        self.area = torch.zeros(count, dtype=torch.float64, device=device)
        """(K,): sum over images of the share of positions at which each prototype has the highest score."""
        self.slots_histogram = torch.zeros(count + 1, dtype=torch.int64, device=device)
        """(K + 1,): number of images with 0, 1, ..., K slots."""

    def update(self, batch: SlotBatch) -> None:
        """Add a batch of images."""
        used = occupied(batch.scores)
        slots = pool_slots(batch.projections, batch.scores, self.temperature)
        similarity = F.cosine_similarity(slots, self.prototypes, dim=2)
        self.nearest.update(batch.indices, similarity.masked_fill(~used, -torch.inf))
        assignment = batch.scores.argmax(dim=1)
        self.num_images += len(used)
        self.image_counts += used.sum(dim=0)
        self.area += assignment.flatten().bincount(minlength=used.shape[1]) / assignment[0].numel()
        self.slots_histogram += used.sum(dim=1).bincount(minlength=used.shape[1] + 1)

    @property
    def used(self) -> list[int]:
        """The prototypes that at least one image uses, ascending."""
        return self.image_counts.nonzero().flatten().tolist()

    @property
    def slots_per_image(self) -> float:
        """The mean number of slots of an image."""
        return self.image_counts.sum().item() / self.num_images

    @property
    def perplexity(self) -> float:
        """The exponential of the entropy of the area over prototypes: K if all have the same area, 1 if one has all."""
        share = self.area / self.area.sum()
        return torch.special.entr(share).sum().exp().item()
