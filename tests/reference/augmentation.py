"""SlotFA's slot-level feature augmentation and the loss it adds to SlotCon's."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.reference import alignment, losses
from tests.reference.grouping import Array, cosine_scores

Ints = NDArray[np.int64]


def assignment(scores: Array) -> Ints:
    """argmax_k s[b,:,h,w]: (B,K,H,W) to (B,H,W)."""
    B, _, H, W = scores.shape
    result = np.zeros((B, H, W), dtype=np.int64)
    for b in range(B):
        for h in range(H):
            for w in range(W):
                result[b, h, w] = int(np.argmax(scores[b, :, h, w]))
    return result


def augmented_map(features: Array, assigned: Ints, alpha: Array, beta: Array) -> Array:
    """alpha_k * x + beta_k at every position assigned to slot k: (B,D,H,W), (B,H,W), (K,D), (K,D) to (B,D,H,W)."""
    B, D, H, W = features.shape
    result = np.zeros((B, D, H, W))
    for b in range(B):
        for h in range(H):
            for w in range(W):
                k = int(assigned[b, h, w])
                for d in range(D):
                    result[b, d, h, w] = float(alpha[k, d]) * float(features[b, d, h, w]) + float(beta[k, d])
    return result


def occupied(assignments: Sequence[Ints]) -> list[int]:
    """The slots assigned anywhere in a view's global batch: every rank's (B,H,W) to ascending numbers."""
    found: set[int] = set()
    for assigned in assignments:
        for slot in assigned.flatten():
            found.add(int(slot))
    return sorted(found)


def how_many(share: float, assignments: Sequence[Ints]) -> int:
    """floor(share x n) of the n occupied slots are augmented."""
    return math.floor(share * len(occupied(assignments)))


def augmented_loss(
    augmented: Sequence[Array],
    prototypes: Array,
    teachers: Sequence[Array],
    center: Array,
    crops: Array,
    flips: NDArray[np.bool_],
) -> float:
    """L_aug: both views' augmented projections (B,D,H,W) grouped with the student's prototypes (K,D), then as L_g.

    Aligned with the teacher's scores (B,K,H,W) of the other view and distilled from them, (view 1 student,
    view 2 teacher) plus (view 2 student, view 1 teacher); crops (B,2,4), flips (B,2).
    """
    students = [cosine_scores(features, prototypes) for features in augmented]
    B = len(crops)
    valid = np.zeros(B, dtype=bool)
    aligned: list[list[Array]] = []
    for maps in (students, teachers):
        views = []
        for a, b in ((0, 1), (1, 0)):
            planes = []
            for i in range(B):
                box, valid[i] = alignment.overlap(crops[i, a], crops[i, b], bool(flips[i, a]))
                planes.append(alignment.align(maps[a][i], box, bool(flips[i, a])))
            views.append(np.stack(planes))
        aligned.append(views)
    (student_1, student_2), (teacher_1, teacher_2) = aligned
    return losses.grouping_loss((student_1, student_2), (teacher_1, teacher_2), center, valid)


def share_moved(before: Sequence[Array], after: Sequence[Array]) -> float:
    """The share of the positions of all views whose arg-max differs between two score maps (B,K,H,W)."""
    changed, count = 0, 0
    for old, new in zip(before, after):
        for a, b in zip(assignment(old).flatten(), assignment(new).flatten()):
            changed += int(a != b)
            count += 1
    return changed / count


def total(
    loss_group: float, loss_augmented: float, loss_contrast: float, weight: float = 1.0, weight_augmented: float = 1.0
) -> float:
    """lambda (L_g + w_aug L_aug) + (1 - lambda) L_c."""
    return weight * (loss_group + weight_augmented * loss_augmented) + (1 - weight) * loss_contrast
