"""The losses of SlotCon and the center of its teacher."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.reference.grouping import Array, softmax, unit

Bools = NDArray[np.bool_]


def distillation(
    student: Array,
    teacher: Array,
    center: Array,
    valid: Sequence[bool] | Bools,
    student_temp: float = 0.1,
    teacher_temp: float = 0.07,
) -> float:
    """One direction of L_g = - sum_k softmax((Q~ - c) / 0.07) log softmax(P~ / 0.1).

    The mean over positions and over the images whose views intersect (`valid`); 0 if there are none.
    Scores (B, K, H, W), center (K,).
    """
    B, K, H, W = student.shape
    total, count = 0.0, 0
    for b in range(B):
        if not valid[b]:
            continue
        for h in range(H):
            for w in range(W):
                target = softmax((np.asarray(teacher[b, :, h, w], dtype=np.float64) - center) / teacher_temp)
                logits = np.asarray(student[b, :, h, w], dtype=np.float64) / student_temp
                top = logits.max()
                log_sum = top + math.log(sum(math.exp(logit - top) for logit in logits))
                total -= sum(target[k] * (logits[k] - log_sum) for k in range(K))
                count += 1
    return total / count if count else 0.0


def grouping_loss(
    students: tuple[Array, Array],
    teachers: tuple[Array, Array],
    center: Array,
    valid: Sequence[bool] | Bools,
    student_temp: float = 0.1,
    teacher_temp: float = 0.07,
) -> float:
    """L_g: (view 1 student, view 2 teacher) plus (view 2 student, view 1 teacher), added and not averaged."""
    forward = distillation(students[0], teachers[1], center, valid, student_temp, teacher_temp)
    backward = distillation(students[1], teachers[0], center, valid, student_temp, teacher_temp)
    return forward + backward


def info_nce(queries: Array, keys: Array, positives: Sequence[int], temperature: float = 0.2) -> float:
    """2 tau mean_i - log(exp(q_i . k_p(i) / tau) / sum_j exp(q_i . k_j / tau)), q and k L2-normalized.

    0 when there is no query.
    """
    if len(queries) == 0:
        return 0.0
    total = 0.0
    for query, positive in zip(queries, positives):
        logits = [float(np.dot(unit(query), unit(key))) / temperature for key in keys]
        top = max(logits)
        log_sum = top + math.log(sum(math.exp(logit - top) for logit in logits))
        total += log_sum - logits[positive]
    return 2 * temperature * total / len(queries)


def slot_contrast(
    slots: Array,
    student_occupied: Bools,
    teacher_slots: Sequence[Array],
    teacher_occupied: Sequence[Bools],
    predictor: Callable[[Array], Array],
    rank: int = 0,
    temperature: float = 0.2,
) -> float:
    """One direction of L_c on one rank.

    `slots` (B, K, D) and `student_occupied` (B, K) are this rank's student in one view; `teacher_slots` and
    `teacher_occupied` hold every rank's teacher in the other view. Queries are this rank's slots occupied in both,
    through the predictor, whose batch holds exactly those rows; keys are all occupied teacher slots of all ranks; the
    positive has the same image and prototype. With fewer than two queries the predictor has no batch statistics and
    the term is 0.
    """
    keys: list[Array] = []
    index: dict[tuple[int, int, int], int] = {}
    for r in range(len(teacher_slots)):
        for b in range(teacher_slots[r].shape[0]):
            for k in range(teacher_slots[r].shape[1]):
                if teacher_occupied[r][b, k]:
                    index[r, b, k] = len(keys)
                    keys.append(np.asarray(teacher_slots[r][b, k], dtype=np.float64))

    rows: list[Array] = []
    positives: list[int] = []
    for b in range(slots.shape[0]):
        for k in range(slots.shape[1]):
            if student_occupied[b, k] and teacher_occupied[rank][b, k]:
                rows.append(np.asarray(slots[b, k], dtype=np.float64))
                positives.append(index[rank, b, k])

    if len(rows) < 2:
        return 0.0
    return info_nce(predictor(np.stack(rows)), np.stack(keys), positives, temperature)


def update_center(center: Array, teacher_scores: Sequence[Array], momentum: float = 0.9) -> Array:
    """c <- 0.9 c + 0.1 mean of the unaligned teacher scores over views (and ranks), images and positions."""
    K = len(center)
    total_score, count = np.zeros(K), 0
    for scores in teacher_scores:
        B, _, H, W = scores.shape
        for b in range(B):
            for h in range(H):
                for w in range(W):
                    total_score += np.asarray(scores[b, :, h, w], dtype=np.float64)
                    count += 1
    return momentum * np.asarray(center, dtype=np.float64) + (1 - momentum) * total_score / count
