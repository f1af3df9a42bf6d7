"""Prototypes -> scores, attention, slots; which slots are occupied (SlotCon, section 3.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-12


def prototype_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every position with every prototype.

    Args:
        features: (B, D, H, W).
        prototypes: (K, D).

    Returns:
        (B, K, H, W) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = F.normalize(features.float(), dim=1, eps=_EPS)
        p = F.normalize(prototypes.float(), dim=1, eps=_EPS)
        return torch.einsum("kd,bdhw->bkhw", p, z)


def slots(features: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Attention-weighted mean of the features, one for each prototype.

    `a = softmax_k(s / temperature) + 1e-6`, `slot_k = sum_hw z a_k / sum_hw a_k`, with z as it is.

    Args:
        features: (B, D, H, W).
        scores: (B, K, H, W) from `prototype_scores`.
        temperature: of the soft-max over the prototypes.

    Returns:
        (B, K, D) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        attention = (scores.float() / temperature).softmax(dim=1) + 1e-6
        total = torch.einsum("bdhw,bkhw->bkd", features.float(), attention)
        return total / attention.sum(dim=(2, 3)).unsqueeze(2)


def occupied(scores: Tensor) -> Tensor:
    """Which slots win the arg-max over prototypes somewhere: scores (B, K, H, W) -> (B, K) bool."""
    winners = scores.argmax(dim=1).flatten(1)
    won = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
    return won.scatter(1, winners, True)


class Grouped(NamedTuple):
    """A view, grouped: slots (B, K, D) and scores (B, K, H, W), both float32."""

    slots: Tensor
    scores: Tensor


class Grouping(nn.Module):
    """K learned prototypes of width D that share out the positions of a map."""

    def __init__(self, num_prototypes: int, dim: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.slot_embed = nn.Embedding(num_prototypes, dim)

    def scores(self, features: Tensor) -> Tensor:
        """Features (B, D, H, W) -> scores (B, K, H, W)."""
        return prototype_scores(features, self.slot_embed.weight)

    def forward(self, features: Tensor, scores: Tensor | None = None) -> Grouped:
        """Features (B, D, H, W), and their scores where they are known -> slots (B, K, D) and scores (B, K, H, W)."""
        scores = self.scores(features) if scores is None else scores
        return Grouped(slots(features, scores, self.temperature), scores)
