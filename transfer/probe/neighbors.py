"""Dense retrieval: a cell's class is that of the training cells whose features are nearest."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer.probe.features import Features
from transfer.probe.predict import cell_shares


@dataclass(frozen=True)
class Memory:
    """M training cells, and how their neighbors' classes are weighed."""

    keys: Tensor
    """(M, C), of length 1."""
    shares: Tensor
    """(M, classes): what share of a cell's pixels is of each class."""
    neighbors: int
    temperature: float

    def __call__(self, features: Tensor) -> Tensor:
        """(C, h, w) -> shares of the classes (classes, h, w), of the nearest keys weighed by soft-max of the cosine."""
        cells = F.normalize(features.to(self.keys.device).flatten(1).T, dim=1)
        cosine, nearest = (cells @ self.keys.T).topk(min(self.neighbors, len(self.keys)), dim=1)
        weights = (cosine / self.temperature).softmax(dim=1)
        return torch.einsum("nk,nkc->cn", weights, self.shares[nearest]).unflatten(1, features.shape[1:])


def remember(
    features: Features, classes: int, size: int, neighbors: int, temperature: float, seed: int, device: torch.device
) -> Memory:
    """`size` random cells of the training images that are not void throughout; all of them if there are fewer."""
    height, width = features.maps.shape[1:3]
    shares = cell_shares(features.labels, (height, width), classes).reshape(-1, classes)
    labeled = np.flatnonzero(shares.sum(axis=1))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(labeled, min(size, len(labeled)), replace=False))
    keys, kept = F.normalize(features.cells(chosen), dim=1), torch.from_numpy(shares[chosen])
    return Memory(keys.to(device), kept.to(device), neighbors, temperature)
