"""A linear classifier (1x1 convolution) on frozen features."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer.probe.features import Features
from transfer.probe.predict import cell_shares

BATCH = 1024
"""Cells a step."""


@dataclass(frozen=True)
class Linear:
    """Standardize each channel, then a 1x1 convolution."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(C, h, w) -> (classes, h, w)."""
        cells = (features.to(self.mean.device).flatten(1).T - self.mean) * self.scale
        return F.linear(cells, self.weight, self.bias).T.unflatten(1, features.shape[1:])


def fit(features: Features, classes: int, steps: int, lr: float, seed: int, device: torch.device) -> Linear:
    """Train on cells, each with the shares of the classes among its pixels as target.

    That is the cross-entropy at every pixel that is not void, of scores that are constant within a cell. AdamW with a
    cosine to zero; channels are standardized by the training images.
    """
    height, across, width = features.maps.shape[1:]
    shares = torch.from_numpy(cell_shares(features.labels, (height, across), classes)).flatten(0, 2)
    mean, scale = (moment.to(device) for moment in _moments(features))
    weight = torch.zeros(classes, width, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(seed)
    labeled = np.flatnonzero(shares.sum(dim=1).numpy())
    for _ in range(steps):
        chosen = np.sort(rng.choice(labeled, min(BATCH, len(labeled)), replace=False))
        logits = F.linear((features.cells(chosen).to(device) - mean) * scale, weight, bias)
        target = shares[chosen].to(device)
        loss = -(target * logits.log_softmax(dim=1)).sum() / target.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Linear(mean, scale, weight.detach(), bias.detach())


def _moments(features: Features) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation (C,) of each channel over images and cells; a constant channel becomes zero."""
    width = features.maps.shape[3]
    total, squares, cells = np.zeros(width), np.zeros(width), 0
    for seen in features.maps:
        flat = np.asarray(seen, dtype=np.float64).reshape(-1, width)
        total, squares, cells = total + flat.sum(axis=0), squares + (flat**2).sum(axis=0), cells + len(flat)
    mean = total / cells
    variance = np.maximum(squares / cells - mean**2, 0)
    scale = np.where(variance > 1e-12 * mean**2, 1 / np.sqrt(variance + 1e-12), 0)
    return torch.from_numpy(mean).float(), torch.from_numpy(scale).float()
