"""Segmentation metrics, soft labels of positions and nearest-neighbor votes: loops over the definitions, in float64."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

VOID = 255
Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def confusion(labels: Labels, predictions: Labels, classes: int, outputs: int) -> Labels:
    """n[i, j]: the number of pixels of class i that were predicted as j, without void pixels."""
    counts = np.zeros((classes, outputs), dtype=np.int64)
    for i, j in zip(labels.ravel().tolist(), predictions.ravel().tolist()):
        if i != VOID:
            counts[i, j] += 1
    return counts


def ious(labels: Labels, predictions: Labels, classes: int) -> list[float]:
    """100 |L and P| / |L or P| of each class over the sets of pixels that are not void; NaN if both are empty."""
    labels, predictions = labels.ravel(), predictions.ravel()
    valid = [pixel for pixel, label in enumerate(labels.tolist()) if label != VOID]
    result = []
    for label in range(classes):
        labeled = {pixel for pixel in valid if labels[pixel] == label}
        predicted = {pixel for pixel in valid if predictions[pixel] == label}
        union = labeled | predicted
        result.append(100 * len(labeled & predicted) / len(union) if union else math.nan)
    return result


def accuracy(labels: Labels, predictions: Labels) -> float:
    """Percentage of correct pixels among those that are not void; NaN if all are."""
    correct = [i == j for i, j in zip(labels.ravel().tolist(), predictions.ravel().tolist()) if i != VOID]
    return 100 * sum(correct) / len(correct) if correct else math.nan


def mean(values: list[float]) -> float:
    """Mean of the values that are not NaN; NaN if all are."""
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def most_correct(counts: Labels) -> int:
    """The largest number of correct pixels of any one-to-one matching of clusters and classes, by trying all."""
    if counts.shape[0] > counts.shape[1]:
        counts = counts.T
    rows, columns = counts.shape
    matchings = itertools.permutations(range(columns), rows)
    return max(sum(int(counts[i, j]) for i, j in enumerate(matching)) for matching in matchings)


def soft_labels(labels: Labels, height: int, width: int, classes: int) -> Array:
    """soft_labels[n, y, x, c]: of the pixels whose upper left corner is in position (y, x), the share of class c."""
    count, size, _ = labels.shape
    result = np.zeros((count, height, width, classes))
    for n, y, x in itertools.product(range(count), range(height), range(width)):
        pixels = [
            int(labels[n, row, column])
            for row in range(size)
            for column in range(size)
            if y * size <= row * height < (y + 1) * size and x * size <= column * width < (x + 1) * size
        ]
        for label in pixels:
            if label != VOID:
                result[n, y, x, label] += 1 / len(pixels)
    return result


def votes(position: Array, keys: Array, soft_labels: Array, neighbors: int, temperature: float) -> Array:
    """Weighted mean of the soft labels of the `neighbors` most similar keys, with weights exp(cosine / temperature)."""
    cosines = [float(position @ key) / (float(np.linalg.norm(position)) * float(np.linalg.norm(key))) for key in keys]
    nearest = sorted(range(len(keys)), key=lambda number: -cosines[number])[:neighbors]
    weights = [math.exp((cosines[number] - cosines[nearest[0]]) / temperature) for number in nearest]
    total = np.zeros(soft_labels.shape[1])
    for weight, number in zip(weights, nearest):
        total += weight / sum(weights) * soft_labels[number]
    return total
