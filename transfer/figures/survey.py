"""What prototypes gather in many images: the nearest ones, and how much each prototype is used."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.grouping import occupied, slots
from transfer.figures.looking import Seen


class Nearest:
    """The k best images of each of K prototypes among all that were added: K x k entries, however many there were.

    Of equal scores the image of the lower number comes first, so that the order of adding changes nothing.
    """

    def __init__(self, prototypes: int, k: int, device: torch.device | str = "cpu"):
        self.scores = torch.full((prototypes, k), -torch.inf, device=device)
        """(K, k) descending; -inf where there are fewer than k."""
        self.images = torch.full((prototypes, k), -1, device=device)
        """(K, k) image numbers; -1 where there are fewer than k."""

    def add(self, numbers: Tensor, scores: Tensor) -> None:
        """Images `numbers` (B,) with scores (B, K), -inf where an image is none of a prototype's."""
        numbers = numbers.to(self.images.device).expand(len(self.images), -1)
        images, order = torch.cat([self.images, numbers], dim=1).sort(dim=1, stable=True)
        scores, better = (
            torch.cat([self.scores, scores.T], dim=1).gather(1, order).sort(dim=1, descending=True, stable=True)
        )
        k = self.scores.shape[1]
        self.scores = scores[:, :k].clone()
        self.images = images.gather(1, better[:, :k]).masked_fill(self.scores.isneginf(), -1)

    def of(self, prototype: int) -> list[tuple[int, float]]:
        """Image numbers and scores of a prototype, best first; k of them at most."""
        images, scores = self.images[prototype].tolist(), self.scores[prototype].tolist()
        return [(image, score) for image, score in zip(images, scores) if image >= 0]


class Survey:
    """Nearest images and usage of each prototype over all images that were added.

    A slot is used where its prototype wins some cell of the map, as in training.
    """

    def __init__(self, prototypes: Tensor, temperature: float, topk: int):
        """Prototypes (K, D), the temperature of the attention, and how many nearest images to keep."""
        count, device = len(prototypes), prototypes.device
        self.prototypes, self.temperature = prototypes, temperature
        self.nearest = Nearest(count, topk, device)
        self.images = 0
        self.images_using = torch.zeros(count, dtype=torch.int64, device=device)
        """(K,): in how many images each prototype is used."""
        self.area = torch.zeros(count, dtype=torch.float64, device=device)
        """(K,): the area that each prototype wins, in images."""
        self.slots_histogram = torch.zeros(count + 1, dtype=torch.int64, device=device)
        """(K + 1,): how many images use 0, 1, ..., K slots."""

    def add(self, seen: Seen) -> None:
        """Take a batch of images into account."""
        used = occupied(seen.scores)
        pooled = slots(seen.projections, seen.scores, self.temperature)
        similarity = F.cosine_similarity(pooled, self.prototypes, dim=2)
        self.nearest.add(seen.numbers, similarity.masked_fill(~used, -torch.inf))
        winners = seen.scores.argmax(dim=1)
        self.images += len(used)
        self.images_using += used.sum(dim=0)
        self.area += winners.flatten().bincount(minlength=used.shape[1]) / winners[0].numel()
        self.slots_histogram += used.sum(dim=1).bincount(minlength=used.shape[1] + 1)

    @property
    def used(self) -> list[int]:
        """Prototypes that some image uses, ascending."""
        return self.images_using.nonzero().flatten().tolist()

    @property
    def slots_per_image(self) -> float:
        """Mean over the images."""
        return self.images_using.sum().item() / self.images

    @property
    def effective(self) -> float:
        """How many prototypes, sharing the area evenly, would have the entropy of its division among these."""
        share = self.area / self.area.sum()
        return torch.special.entr(share).sum().exp().item()


def draw_sample(candidates: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the candidates, or all if there are fewer, none twice, ascending."""
    chosen = np.random.default_rng(seed).permutation(len(candidates))[:count]
    return sorted(int(candidates[number]) for number in chosen)
