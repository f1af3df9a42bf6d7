"""Figure: a t-SNE of the projections of many images, colored by prototype."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.spatial import cKDTree

from transfer.figures.extractor import SlotExtractor
from transfer.figures.labels import LabelPlacer
from transfer.figures.layout import MUTED_COLOR, TEXT_COLOR, new_figure
from utils.errors import UsageError
from utils.visualization import palette

_MAX_LABELS = 40
"""Number of prototypes, the most frequent ones, that have a line of the legend and may have a label."""
_MIN_LABELED_POINTS = 10
"""Number of points below which a prototype has no label: they may lie far from each other."""
_FONT_SIZE, _BOX_PADDING, _EDGE_WIDTH = 7.5, 2.0, 1.0
"""Of the labels, in points."""
_LEGEND_LINE, _LEGEND_COLUMN = 0.165, 1.0
"""Inches: the height of a line of the legend, and the width of a column."""
_NEIGHBORHOOD = 0.05
"""Radius in which the points around a label are counted, as a share of the larger side of the t-SNE."""


class PrototypePoints(NamedTuple):
    """The points of one prototype."""

    prototype: int
    points: np.ndarray
    """(N, 2), those with the most points around them first."""
    color: np.ndarray
    """(3,)."""


def draw_tsne(
    extractor: SlotExtractor, indices: Sequence[int], num_points: int, seed: int, dpi: int, details: str
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
    return draw_points(points, prototypes, dpi, f"{len(points):,} positions · {details}")


def draw_points(points: np.ndarray, prototypes: np.ndarray, dpi: int, details: str) -> Figure:
    """Draw points (N, 2) in the colors of their prototypes (N,), with labels and a legend of the most frequent ones."""
    groups = group_by_prototype(points, prototypes)[:_MAX_LABELS]
    width, height = np.ptp(points, axis=0)
    height = float(np.clip(7.8 * height / width, 4, 10)) + 0.8
    columns = math.ceil(len(groups) * _LEGEND_LINE / (height - 1.5))
    size = 8 + columns * _LEGEND_COLUMN, height
    figure = new_figure(size, dpi, "t-SNE of projections, colored by prototype", details)
    axes = figure.subplots()
    axes.axis("off")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.03)
    colors = palette(int(prototypes.max()) + 1).numpy()[prototypes]
    axes.scatter(points[:, 0], points[:, 1], s=float(np.clip(32_000 / len(points), 3, 30)), c=colors, linewidths=0)
    _draw_legend(axes, groups, len(points), len(np.unique(prototypes)), columns)
    _draw_labels(axes, groups)
    return figure


def sample_projections(
    extractor: SlotExtractor, indices: Sequence[int], num_points: int, seed: int
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


def group_by_prototype(points: np.ndarray, prototypes: np.ndarray) -> list[PrototypePoints]:
    """Return the points (N, 2) of each of the prototypes (N,), the most frequent prototype first.

    The points of a prototype are ordered by the number of its points around them, so that the first one lies where
    they are densest.
    """
    numbers, inverse, counts = np.unique(prototypes, return_inverse=True, return_counts=True)
    colors = palette(int(numbers[-1]) + 1).numpy()
    radius = _NEIGHBORHOOD * np.ptp(points, axis=0).max()
    groups = []
    for index in np.argsort(-counts, kind="stable"):
        members = points[inverse == index]
        num_around = cKDTree(members).query_ball_point(members, radius, return_length=True)
        order = np.argsort(-num_around, kind="stable")
        groups.append(PrototypePoints(int(numbers[index]), members[order], colors[numbers[index]]))
    return groups


def _draw_legend(axes: Axes, groups: Sequence[PrototypePoints], num_points: int, num_used: int, columns: int) -> None:
    """Draw a legend with the color of each prototype, its number and its share of the points."""
    marks = [Line2D([], [], linestyle="", marker="o", markersize=6, color=tuple(group.color)) for group in groups]
    shares = [100 * len(group.points) / num_points for group in groups]
    texts = [
        f"{group.prototype}: " + (f"{share:.1f}%" if share >= 0.1 else "<0.1%") for group, share in zip(groups, shares)
    ]
    shown = f"{len(groups)} most frequent of {num_used}\nprototypes" if len(groups) < num_used else "prototypes"
    title = f"{shown}: share\nof the positions"
    style: dict[str, Any] = {"fontsize": 7.5, "title_fontsize": 7.5, "labelcolor": TEXT_COLOR, "frameon": False}
    style |= {"handletextpad": 0, "columnspacing": 0.8, "ncols": columns, "alignment": "left"}
    legend = axes.legend(marks, texts, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, title=title, **style)
    legend.get_title().set_color(MUTED_COLOR)


def _draw_labels(axes: Axes, groups: Sequence[PrototypePoints]) -> None:
    """Draw the number of each prototype on the first of its points at which it overlaps no other number."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # determines the scale of the axes
    (left, right), (x0, x1) = axes.get_window_extent().intervalx, axes.get_xlim()
    points_per_unit = float((right - left) / (x1 - x0)) * 72 / axes.figure.dpi
    placer = LabelPlacer(_FONT_SIZE, _BOX_PADDING + _EDGE_WIDTH, points_per_unit)
    box = {"boxstyle": f"round,pad={_BOX_PADDING / _FONT_SIZE}", "edgecolor": "white", "linewidth": _EDGE_WIDTH}
    style: dict[str, Any] = {"fontsize": _FONT_SIZE, "weight": "bold", "ha": "center", "va": "center_baseline"}
    for group in groups:
        enough = len(group.points) >= _MIN_LABELED_POINTS
        position = placer.place(group.prototype, group.points) if enough else None
        if position is not None:
            is_light = group.color @ (0.3, 0.59, 0.11) > 0.6
            style |= {"color": "black" if is_light else "white", "bbox": box | {"facecolor": group.color}}
            axes.text(position[0], position[1], str(group.prototype), in_layout=False, **style)
