"""Figure: cells of many images, laid out by t-SNE of their projections, colored by slot."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from utils.errors import UsageError
from transfer.figures.looking import Observer
from transfer.figures.sheet import PALE
from utils.visualization import palette

_NAMED = 40
"""Prototypes with most cells, whose numbers are written where there is room."""


def draw_tsne(observer: Observer, images: Sequence[int], points: int, seed: int, dpi: int, facts: str) -> Figure:
    """About `points` cells, spread evenly over `images`.

    Raises:
        UsageError: scikit-learn is not installed, or there are too few cells.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UsageError("--figure tsne needs scikit-learn; pip install scikit-learn") from None
    features, slots = sample_cells(observer, images, points, seed)
    if len(features) < 10:
        raise UsageError(f"--figure tsne: {len(features)} cells are too few; use more images or a larger --image-size")
    perplexity = min(30, (len(features) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)
    return _plot(places, slots, dpi, f"{len(features):,} cells of {facts}")


def sample_cells(observer: Observer, images: Sequence[int], points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalized projections (N, D) of cells drawn from `images`, as many from each, and their prototypes (N,)."""
    each = -(-points // len(images))
    features, slots = [], []
    for seen in observer.look(images, "reading"):
        projections = F.normalize(seen.projections.float(), dim=1).flatten(2).transpose(1, 2).cpu()
        winners = seen.scores.argmax(dim=1).flatten(1).cpu()
        for number, rows, won in zip(seen.numbers.tolist(), projections, winners):
            chosen = np.random.default_rng([seed, number]).permutation(len(rows))[:each]
            features.append(rows[chosen])
            slots.append(won[chosen])
    return torch.cat(features).numpy(), torch.cat(slots).numpy()


def _plot(places: np.ndarray, slots: np.ndarray, dpi: int, facts: str) -> Figure:
    wide, high = np.ptp(places, axis=0)
    height = float(np.clip(7.8 * high / wide, 4, 10))
    figure = Figure(figsize=(8, height + 0.8), dpi=dpi, facecolor="white")
    axes = figure.add_axes((0.0125, 0.1 / (height + 0.8), 0.975, height / (height + 0.8)))
    axes.axis("off")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.03)
    left, top = 0.2 / 8, 1 - 0.2 / (height + 0.8)
    figure.text(left, top, "Cells by likeness (t-SNE), colored by slot", fontsize=12, weight="bold", va="top")
    figure.text(left, top - 0.26 / (height + 0.8), facts, fontsize=8.5, color=PALE, va="top", parse_math=False)
    found, counts = np.unique(slots, return_counts=True)
    order = found[np.argsort(-counts, kind="stable")]
    colors = dict(zip(order.tolist(), palette(len(order)).numpy()))
    size = float(np.clip(32_000 / len(places), 3, 30))
    axes.scatter(places[:, 0], places[:, 1], s=size, c=[colors[slot] for slot in slots.tolist()], linewidths=0)
    written: list[np.ndarray] = []
    apart = np.array([0.045, 0.025]) * max(wide, high)
    for prototype in order[:_NAMED].tolist():
        own = places[slots == prototype]
        place = own[np.abs(own - np.median(own, axis=0)).sum(axis=1).argmin()]  # a cell of its own, near the middle
        if all((np.abs(place - other) > apart).any() for other in written):
            written.append(place)
            _write_number(axes, place, prototype, colors[prototype])
    return figure


def _write_number(axes: Any, place: np.ndarray, prototype: int, color: np.ndarray) -> None:
    ink = "black" if color @ (0.3, 0.59, 0.11) > 0.6 else "white"
    box = {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": "white", "linewidth": 0.8}
    axes.text(*place, str(prototype), fontsize=7.5, weight="bold", ha="center", va="center", color=ink, bbox=box)
