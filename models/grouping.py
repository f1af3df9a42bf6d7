"""Semantic grouping by prototypes (SlotCon, section 3.2): scores, attention, slots, and which slots are occupied."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import upcast

_EPS = 1e-12


def prototype_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Compute the cosine similarity of every position with every prototype.

    Args:
        features: (B, D, H, W).
        prototypes: (K, D).

    Returns:
        (B, K, H, W) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = F.normalize(upcast(features), dim=1, eps=_EPS)
        p = F.normalize(upcast(prototypes), dim=1, eps=_EPS)
        return torch.einsum("kd,bdhw->bkhw", p, z)


def pool_slots(features: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Pool the features by attention, once for each prototype.

    `a = softmax_k(s / temperature) + 1e-6`, `slot_k = sum_hw z a_k / sum_hw a_k`; the features z are not normalized.

    Args:
        features: (B, D, H, W).
        scores: (B, K, H, W) from `prototype_scores`.
        temperature: of the softmax over the prototypes.

    Returns:
        (B, K, D) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        attention = (upcast(scores) / temperature).softmax(dim=1) + 1e-6
        total = torch.einsum("bdhw,bkhw->bkd", upcast(features), attention)
        return total / attention.sum(dim=(2, 3)).unsqueeze(2)


def occupied(scores: Tensor) -> Tensor:
    """Return which slots are the argmax over prototypes at some position: scores (B, K, H, W) -> (B, K) bool."""
    assignment = scores.argmax(dim=1).flatten(1)
    mask = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
    return mask.scatter(1, assignment, True)


class ViewSlots(NamedTuple):
    """The slots (B, K, D) of a view and the scores (B, K, H, W) they were pooled with, both float32."""

    slots: Tensor
    scores: Tensor


class Grouping(nn.Module):
    """K learned prototypes of width D, to which the positions of a feature map are assigned."""

    def __init__(self, num_prototypes: int, dim: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.slot_embed = nn.Embedding(num_prototypes, dim)

    def scores(self, features: Tensor) -> Tensor:
        """Return the scores (B, K, H, W) of features (B, D, H, W)."""
        return prototype_scores(features, self.slot_embed.weight)

    def forward(self, features: Tensor, scores: Tensor | None = None) -> ViewSlots:
        """Group features (B, D, H, W), whose scores (B, K, H, W) are computed unless given."""
        scores = self.scores(features) if scores is None else scores
        return ViewSlots(pool_slots(features, scores, self.temperature), scores)
