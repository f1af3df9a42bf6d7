"""The slots' health, position by position."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def health(student: list[Array], teacher: list[Array], prototypes: Array, center: Array, temperature: float) -> dict:
    """Scores (B, K, H, W) of two views each, prototypes (K, D), center (K,) -> the measures by name."""
    images, count, height, width = teacher[0].shape

    def found(scores: Array, image: int) -> set[int]:
        places = [(y, x) for y in range(height) for x in range(width)]
        return {max(range(count), key=lambda k: scores[image, k, y, x]) for y, x in places}

    numbers, entropies, positions = [], [], [0.0] * count
    for scores in teacher:
        for image in range(images):
            numbers.append(len(found(scores, image)))
            for y in range(height):
                for x in range(width):
                    column = (scores[image, :, y, x] - center) / temperature
                    share = np.exp(column - column.max())
                    share = share / share.sum()
                    entropies.append(-sum(p * math.log(p) for p in share if p > 0) / math.log(count))
                    positions[int(np.argmax(scores[image, :, y, x]))] += 1
    positives = 0
    for a, b in ((0, 1), (1, 0)):
        for image in range(images):
            positives += len(found(student[a], image) & found(teacher[b], image))
    cosines = []
    for i in range(count):
        for j in range(count):
            if i != j:
                lengths = np.linalg.norm(prototypes[i]) * np.linalg.norm(prototypes[j])
                cosines.append(float(prototypes[i] @ prototypes[j]) / lengths)
    return {
        "slots_per_image": np.mean(numbers),
        "positives": positives,
        "assignment_entropy": np.mean(entropies),
        "prototype_norm": np.mean([np.linalg.norm(p) for p in prototypes]),
        "prototype_spread": 1 - np.mean(cosines),
        "slot_positions": np.array(positions),
    }
