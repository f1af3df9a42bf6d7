"""Clusters that were found without labels: a model's own prototypes, or k-means on features."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from transfer.probe.features import Features

_SAMPLE = 1_000_000
"""Cells that k-means sees at most."""


def nearest(centers: Tensor, features: Tensor) -> Tensor:
    """Cosine of every position with every center: (K, D) and (D, h, w) -> (K, h, w)."""
    return torch.einsum("kd,dhw->khw", F.normalize(centers, dim=1), F.normalize(features.to(centers.device), dim=0))


def kmeans(features: Features, clusters: int, seed: int) -> Tensor:
    """Centers (clusters, C) of length 1 by mini-batch k-means on normalized cells (spherical up to its averaging)."""
    total = int(np.prod(features.maps.shape[:3]))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(total, min(total, _SAMPLE), replace=False))
    cells = F.normalize(features.cells(chosen), dim=1).numpy()
    found = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=4096).fit(cells)
    return F.normalize(torch.from_numpy(found.cluster_centers_).float(), dim=1)
