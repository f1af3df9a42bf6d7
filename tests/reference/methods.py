"""SlotCon and SlotFA put together from the other references, from the projections on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.reference import alignment, grouping, heads, losses
from tests.reference.grouping import Array


class Inputs(NamedTuple):
    """What the losses are computed from: projections (B, D, H, W) of both views, and parameters."""

    student: list[Array]
    teacher: list[Array]
    prototypes_q: Array
    prototypes_k: Array
    predictor: dict[str, Array]
    center: Array


class Geometry(NamedTuple):
    """Where the views of a batch were cut: crops (B, 2, 4), flips (B, 2)."""

    crops: Array
    flips: NDArray[np.bool_]


def grouping_loss(
    student_scores: Sequence[Array], teacher_scores: Sequence[Array], center: Array, geometry: Geometry
) -> float:
    """L_g, or L_aug for augmented student scores: align the scores (B, K, H, W) of both views, then distill."""
    crops, flips = geometry
    aligned: list[list[Array]] = [[], []]
    for a, b in ((0, 1), (1, 0)):
        boxes = [alignment.overlap_box(crops[i, a], crops[i, b], bool(flips[i, a])) for i in range(len(crops))]
        for views, scores in zip(aligned, (student_scores, teacher_scores)):
            planes = [alignment.align(scores[a][i], box, bool(flips[i, a])) for i, (box, _) in enumerate(boxes)]
            views.append(np.stack(planes))
    valid = [intersects for _, intersects in boxes]
    (student_1, student_2), (teacher_1, teacher_2) = aligned
    return losses.grouping_loss((student_1, student_2), (teacher_1, teacher_2), center, valid)


def slotcon(inputs: Inputs, geometry: Geometry, weight: float = 0.5) -> dict[str, float | Array]:
    """The loss of SlotCon, its two terms, and the new center (K,)."""
    student = [grouping.cosine_scores(z, inputs.prototypes_q) for z in inputs.student]
    teacher = [grouping.cosine_scores(z, inputs.prototypes_k) for z in inputs.teacher]
    loss_group = grouping_loss(student, teacher, inputs.center, geometry)
    loss_contrast = 0.0
    for a, b in ((0, 1), (1, 0)):
        loss_contrast += losses.slot_contrast(
            grouping.slots(inputs.student[a], student[a]),
            grouping.occupied(student[a]),
            [grouping.slots(inputs.teacher[b], teacher[b])],
            [grouping.occupied(teacher[b])],
            lambda rows: heads.mlp(rows, inputs.predictor),
        )
    return {
        "loss": weight * loss_group + (1 - weight) * loss_contrast,
        "loss/group": loss_group,
        "loss/contrast": loss_contrast,
        "center": losses.update_center(inputs.center, teacher),
    }


def augmented_loss(augmented: Sequence[Array], inputs: Inputs, geometry: Geometry) -> float:
    """L_aug of SlotFA: both augmented projections (B, D, H, W), grouped with the student's prototypes."""
    student = [grouping.cosine_scores(z, inputs.prototypes_q) for z in augmented]
    teacher = [grouping.cosine_scores(z, inputs.prototypes_k) for z in inputs.teacher]
    return grouping_loss(student, teacher, inputs.center, geometry)
