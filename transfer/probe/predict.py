"""From scores on an encoder's map to labels at the pixels, and how right they are."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from transfer.probe.features import Features
from transfer.probe.scores import VOID, Counts, confusion

Predict = Callable[[Tensor], Tensor]
"""Features of one image (C, h, w) -> scores of each class or cluster (n, h, w)."""


def winners(scores: Tensor, size: int) -> NDArray[np.int64]:
    """Scores (n, h, w), bilinear to (n, size, size) -> the winner at every pixel, (size, size)."""
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0].argmax(dim=0).cpu().numpy()


def label_maps(features: Features, predict: Predict) -> Iterator[NDArray[np.int64]]:
    """The winners in each image, at the size of its labels."""
    for seen in features.maps:
        one = torch.from_numpy(np.array(seen)).float().permute(2, 0, 1)
        yield winners(predict(one), features.labels.shape[1])


def count(features: Features, predict: Predict, classes: int, found: int) -> Counts:
    """The confusion matrix (classes, found) over all images."""
    total = np.zeros((classes, found), dtype=np.int64)
    for labels, winner in zip(features.labels, label_maps(features, predict)):
        total += confusion(labels, winner, classes, found)
    return total


def cell_shares(labels: NDArray[np.uint8], side: tuple[int, int], classes: int) -> NDArray[np.float32]:
    """Which share of the pixels below each cell of a map is of each class; void pixels are of none.

    Args:
        labels: (N, S, S).
        side: h, w of the map.

    Returns:
        (N, h, w, classes), summing up to 1 less the share of void.
    """
    height, width = side
    size = labels.shape[1]
    rows, columns = np.arange(size) * height // size, np.arange(size) * width // size
    cells = (rows[:, None] * width + columns[None]).ravel()
    pixels = np.bincount(cells, minlength=height * width)
    shares = np.empty((len(labels), height, width, classes), dtype=np.float32)
    for number, mask in enumerate(labels):
        flat = mask.ravel()
        known = flat != VOID
        counts = np.bincount(cells[known] * classes + flat[known], minlength=height * width * classes)
        shares[number] = (counts.reshape(-1, classes) / pixels[:, None]).reshape(height, width, classes)
    return shares
