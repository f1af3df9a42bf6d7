"""SlotFA's slot-level feature augmentation."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.reference.grouping import Array

Ints = NDArray[np.int64]


def assignment(scores: Array) -> Ints:
    """argmax_k s[b,:,h,w]: (B, K, H, W) to (B, H, W)."""
    B, _, H, W = scores.shape
    result = np.zeros((B, H, W), dtype=np.int64)
    for b, h, w in np.ndindex(B, H, W):
        result[b, h, w] = int(np.argmax(scores[b, :, h, w]))
    return result


def augmented_map(features: Array, assigned: Ints, alpha: Array, beta: Array) -> Array:
    """alpha_k x + beta_k at every position of slot k: (B, D, H, W), (B, H, W), (K, D), (K, D) to (B, D, H, W)."""
    result = np.zeros(features.shape)
    for b, d, h, w in np.ndindex(*features.shape):
        k = int(assigned[b, h, w])
        result[b, d, h, w] = float(alpha[k, d]) * float(features[b, d, h, w]) + float(beta[k, d])
    return result


def occupied(assignments: Sequence[Ints]) -> set[int]:
    """The slots that any position of a view has, given the assignments (B, H, W) of every rank."""
    return {int(slot) for assigned in assignments for slot in assigned.flatten()}


def selected_count(ratio: float, assignments: Sequence[Ints]) -> int:
    """floor(ratio n) of the n occupied slots are augmented."""
    return math.floor(ratio * len(occupied(assignments)))


def share_moved(before: Sequence[Array], after: Sequence[Array]) -> float:
    """The share of the positions of all views whose argmax differs between two score maps (B, K, H, W)."""
    moved = [assignment(old) != assignment(new) for old, new in zip(before, after)]
    return float(np.mean(moved))
