"""How label maps are compared, and what lies below a cell: plain loops from the definitions."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

VOID = 255
Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def confusion(truth: Ints, found: Ints, classes: int, clusters: int) -> Ints:
    """n[i, j]: pixels of class i that were found to be j; void pixels are left out."""
    counts = np.zeros((classes, clusters), dtype=np.int64)
    for i, j in zip(truth.ravel().tolist(), found.ravel().tolist()):
        if i != VOID:
            counts[i, j] += 1
    return counts


def ious(truth: Ints, found: Ints, classes: int) -> list[float]:
    """100 |T and F| / |T or F| of each class by sets of pixels that are not void; NaN where there are none."""
    known = [number for number, label in enumerate(truth.ravel().tolist()) if label != VOID]
    truth, found = truth.ravel(), found.ravel()
    result = []
    for label in range(classes):
        there = {number for number in known if truth[number] == label}
        seen = {number for number in known if found[number] == label}
        result.append(100 * len(there & seen) / len(there | seen) if there | seen else math.nan)
    return result


def accuracy(truth: Ints, found: Ints) -> float:
    """Per cent of the pixels that are not void; NaN if all are."""
    right = [int(i == j) for i, j in zip(truth.ravel().tolist(), found.ravel().tolist()) if i != VOID]
    return 100 * sum(right) / len(right) if right else math.nan


def mean(values: list[float]) -> float:
    """Of those that are numbers."""
    real = [value for value in values if not math.isnan(value)]
    return sum(real) / len(real) if real else math.nan


def most_right(counts: Ints) -> int:
    """The most pixels that any one-to-one match of clusters and classes gets right, by trying them all."""
    if counts.shape[0] > counts.shape[1]:
        counts = counts.T
    rows, columns = counts.shape
    return max(
        sum(int(counts[i, j]) for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(columns), rows)
    )


def cell_shares(labels: Ints, height: int, width: int, classes: int) -> Array:
    """shares[n, y, x, c]: of the pixels whose upper left corner is in cell (y, x), the share that is of class c."""
    count, size, _ = labels.shape
    shares = np.zeros((count, height, width, classes))
    for n, y, x in itertools.product(range(count), range(height), range(width)):
        below = [
            int(labels[n, row, column])
            for row in range(size)
            for column in range(size)
            if y * size <= row * height < (y + 1) * size and x * size <= column * width < (x + 1) * size
        ]
        for label in below:
            if label != VOID:
                shares[n, y, x, label] += 1 / len(below)
    return shares


def votes(cell: Array, keys: Array, shares: Array, neighbors: int, temperature: float) -> Array:
    """The shares of the `neighbors` keys of the largest cosine, weighed by exp(cosine / temperature), sum 1."""
    cosines = [float(cell @ key) / (float(np.linalg.norm(cell)) * float(np.linalg.norm(key))) for key in keys]
    best = sorted(range(len(keys)), key=lambda number: -cosines[number])[:neighbors]
    weights = [math.exp((cosines[number] - cosines[best[0]]) / temperature) for number in best]
    total = np.zeros(shares.shape[1])
    for weight, number in zip(weights, best):
        total += weight / sum(weights) * shares[number]
    return total
