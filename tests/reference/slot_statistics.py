"""Statistics of the slots, position by position."""

import math
from typing import Any

import numpy as np

from tests.reference.grouping import Array, softmax, unit


def slot_statistics(
    student: list[Array], teacher: list[Array], prototypes: Array, center: Array, temperature: float
) -> dict[str, Any]:
    """Compute the statistics of scores (B, K, H, W) of two views each, prototypes (K, D) and center (K,)."""
    images, count, height, width = teacher[0].shape

    def occupied(scores: Array, image: int) -> set[int]:
        return {int(np.argmax(scores[image, :, y, x])) for y, x in np.ndindex(height, width)}

    numbers, entropies, positions = [], [], [0.0] * count
    for scores in teacher:
        for image in range(images):
            numbers.append(len(occupied(scores, image)))
            for y, x in np.ndindex(height, width):
                assignment = softmax((scores[image, :, y, x] - center) / temperature)
                entropies.append(-sum(p * math.log(p) for p in assignment if p > 0) / math.log(count))
                positions[int(np.argmax(scores[image, :, y, x]))] += 1
    positives = 0
    for a, b in ((0, 1), (1, 0)):
        for image in range(images):
            positives += len(occupied(student[a], image) & occupied(teacher[b], image))
    cosines = [unit(prototypes[i]) @ unit(prototypes[j]) for i, j in np.ndindex(count, count) if i != j]
    return {
        "slots/per_image": np.mean(numbers),
        "slots/positives": positives,
        "slots/assignment_entropy": np.mean(entropies),
        "slots/prototype_norm": np.mean([math.sqrt(p @ p) for p in prototypes]),
        "slots/prototype_spread": 1 - np.mean(cosines),
        "slots/positions": np.array(positions),
    }
