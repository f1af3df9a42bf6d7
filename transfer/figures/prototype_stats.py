"""Statistics of prototypes over many images: their nearest images, and how much each prototype is used."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.grouping import occupied, pool_slots
from transfer.figures.extractor import SlotBatch


class NearestImages:
    """The k highest-scoring images of each of K prototypes, in memory for K x k entries.

    Ties go to the lower image index, so that the order of the updates does not matter.
    """

    def __init__(self, num_prototypes: int, k: int, device: torch.device | str = "cpu"):
        self.scores = torch.full((num_prototypes, k), -torch.inf, device=device)
        """(K, k) descending; -inf where there are fewer than k images."""
        self.indices = torch.full((num_prototypes, k), -1, device=device)
        """(K, k) image indices; -1 where there are fewer than k images."""

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Add the images `indices` (B,) with scores (B, K), -inf where an image does not use a prototype."""
        indices = indices.to(self.indices.device).expand(len(self.indices), -1)
        indices, by_index = torch.cat([self.indices, indices], dim=1).sort(dim=1, stable=True)
        candidates = torch.cat([self.scores, scores.T], dim=1).gather(1, by_index)
        ranked, by_score = candidates.sort(dim=1, descending=True, stable=True)
        k = self.scores.shape[1]
        self.scores = ranked[:, :k].clone()
        self.indices = indices.gather(1, by_score[:, :k]).masked_fill(self.scores.isneginf(), -1)

    def ranking(self, prototype: int) -> list[tuple[int, float]]:
        """Return at most k pairs of image index and score, best first."""
        indices, scores = self.indices[prototype].tolist(), self.scores[prototype].tolist()
        return [(index, score) for index, score in zip(indices, scores) if index >= 0]


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
