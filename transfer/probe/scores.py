"""How well label maps agree: confusion matrix, mIoU, pixel accuracy, and clusters matched to classes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

VOID = 255

Labels = NDArray[np.integer]
Counts = NDArray[np.int64]


def confusion(truth: Labels, found: Labels, classes: int, clusters: int) -> Counts:
    """How many pixels of class i were found to be j: (classes, clusters); void truth (VOID) does not count.

    Args:
        truth: classes 0 .. classes - 1 and VOID, any shape.
        found: 0 .. clusters - 1, the same shape.
    """
    known = truth != VOID
    pairs = truth[known].astype(np.int64) * clusters + found[known]
    return np.bincount(pairs, minlength=classes * clusters).reshape(classes, clusters)


@dataclass(frozen=True)
class Score:
    """In per cent; a class that is neither there nor found takes no part in the mean."""

    miou: float
    accuracy: float
    """Share of the pixels that are right."""
    iou: tuple[float, ...]
    """Of each class; NaN where it takes no part."""


def score(counts: Counts) -> Score:
    """mIoU and pixel accuracy of a confusion matrix (classes, classes or more).

    Columns beyond the classes are pixels that were given no class: they are wrong, and no class's.
    """
    classes = len(counts)
    right = np.diagonal(counts).astype(np.float64)
    union = counts.sum(axis=1) + counts[:, :classes].sum(axis=0) - right
    iou = np.divide(100 * right, union, out=np.full(classes, np.nan), where=union > 0)
    total = counts.sum()
    accuracy = 100 * right.sum() / total if total else np.nan
    miou = float(np.nanmean(iou)) if (union > 0).any() else float("nan")
    return Score(miou, float(accuracy), tuple(iou.tolist()))


def match(counts: Counts) -> NDArray[np.int64]:
    """The class of each cluster by the Hungarian algorithm, one to one, most pixels right; -1 for those left over.

    Args:
        counts: (classes, clusters) of the whole set.
    """
    rows, columns = linear_sum_assignment(counts, maximize=True)
    matched = np.full(counts.shape[1], -1, dtype=np.int64)
    matched[columns] = rows
    return matched


def majority(counts: Counts) -> NDArray[np.int64]:
    """The class of each cluster that most of its pixels have, many to one (over-clustering); -1 for empty ones."""
    return np.where(counts.sum(axis=0) > 0, counts.argmax(axis=0), -1)


def relabel(counts: Counts, classes: NDArray[np.int64]) -> Counts:
    """The confusion matrix (classes, classes + 1) of clusters that were given `classes`; the last column is none."""
    relabeled = np.zeros((len(counts), len(counts) + 1), dtype=np.int64)
    np.add.at(relabeled.T, classes, counts.T)  # -1 is the last
    return relabeled
