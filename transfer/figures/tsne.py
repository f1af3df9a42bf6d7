"""Figure: a t-SNE of the projections of many images, colored by prototype."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from transfer.figures.extractor import FeatureExtractor
from transfer.figures.layout import new_figure
from utils.errors import UsageError
from utils.visualization import palette

_MAX_LABELS = 40


def draw_tsne(
    extractor: FeatureExtractor, indices: Sequence[int], num_points: int, seed: int, dpi: int, details: str
) -> Figure:
    """Draw about `num_points` positions of the feature maps of images.

    Raises:
        UsageError: scikit-learn is not installed, or there are too few positions.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UsageError("--figure tsne needs scikit-learn; pip install scikit-learn") from None
    projections, prototypes = sample_projections(extractor, indices, num_points, seed)
    if len(projections) < 10:
        raise UsageError(f"--figure tsne: only {len(projections)} positions; use more images or a larger --image-size")
    perplexity = min(30, (len(projections) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(projections)
    width, height = np.ptp(points, axis=0)
    size = 8, float(np.clip(7.8 * height / width, 4, 10)) + 0.8
    figure = new_figure(
        size, dpi, "t-SNE of projections, colored by prototype", f"{len(points):,} positions · {details}"
    )
    _draw_points(figure.subplots(), points, prototypes)
    return figure


def sample_projections(
    extractor: FeatureExtractor, indices: Sequence[int], num_points: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample positions of feature maps, equally many from each image.

    Returns:
        Their normalized projections (N, D) and the prototypes with the highest score there (N,).
    """
    per_image = -(-num_points // len(indices))
    projections, prototypes = [], []
    for batch in extractor.extract(indices, "extracting"):
        rows = F.normalize(batch.projections.float(), dim=1).flatten(2).transpose(1, 2).cpu()
        assignments = batch.scores.argmax(dim=1).flatten(1).cpu()
        for index, features, assignment in zip(batch.indices.tolist(), rows, assignments):
            chosen = np.random.default_rng([seed, index]).permutation(len(features))[:per_image]
            projections.append(features[chosen])
            prototypes.append(assignment[chosen])
    return torch.cat(projections).numpy(), torch.cat(prototypes).numpy()


def _draw_points(axes: Axes, points: np.ndarray, prototypes: np.ndarray) -> None:
    """Draw points (N, 2), and the numbers of the most frequent prototypes where they do not overlap."""
    axes.axis("off")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.03)
    numbers, inverse, counts = np.unique(prototypes, return_inverse=True, return_counts=True)
    by_count = np.argsort(-counts, kind="stable")
    colors = np.empty((len(numbers), 3))
    colors[by_count] = palette(len(numbers)).numpy()
    size = float(np.clip(32_000 / len(points), 3, 30))
    axes.scatter(points[:, 0], points[:, 1], s=size, c=colors[inverse], linewidths=0)

    positions: list[np.ndarray] = []
    min_distance = np.array([0.045, 0.025]) * np.ptp(points, axis=0).max()
    for cluster in by_count[:_MAX_LABELS]:
        members = points[inverse == cluster]
        position = members[np.abs(members - np.median(members, axis=0)).sum(axis=1).argmin()]
        if all((np.abs(position - other) > min_distance).any() for other in positions):
            positions.append(position)
            _draw_label(axes, position, str(numbers[cluster]), colors[cluster])


def _draw_label(axes: Axes, position: np.ndarray, text: str, color: np.ndarray) -> None:
    luminance = color @ (0.3, 0.59, 0.11)
    box = {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": "white", "linewidth": 0.8}
    style: dict[str, Any] = {"fontsize": 7.5, "weight": "bold", "ha": "center", "va": "center", "bbox": box}
    axes.text(position[0], position[1], text, color="black" if luminance > 0.6 else "white", **style)
