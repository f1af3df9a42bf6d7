"""Figure: the nearest images of prototypes, with the prototype's region highlighted."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from transfer.figures.extractor import SlotExtractor
from transfer.figures.layout import MUTED_COLOR, TEXT_COLOR, grid_shape, new_figure
from transfer.figures.prototype_stats import PrototypeStats
from transfer.figures.strips import render_strips
from utils.visualization import palette

_SIDE, _TEXT_HEIGHT = 1.3, 0.4
"""Inches: the side of an image, and the height of the text above and below it."""
_GAP_SHARE = 0.04
"""Space between two images, as a share of an image."""
_BAR_SHARE = 0.06
"""Width of the bar in the color of the prototype, as a share of an image."""
_EMPTY = torch.full((1, 1, 3), 238, dtype=torch.uint8)
"""A light gray square in place of the images of an unused prototype."""


def draw_neighbors(
    extractor: SlotExtractor,
    stats: PrototypeStats,
    prototypes: Sequence[int],
    alpha: float,
    dpi: int,
    details: str,
) -> Figure:
    """Draw a panel for each prototype: its usage, its color, its nearest images and their cosine similarities."""
    rankings = {prototype: stats.nearest.ranking(prototype) for prototype in prototypes}
    length = max(2, *map(len, rankings.values()))  # the usage above the images is wider than one image
    rows, columns = grid_shape(len(prototypes), length * _SIDE, _SIDE + _TEXT_HEIGHT)
    left, right = -_BAR_SHARE - _GAP_SHARE, length * (1 + _GAP_SHARE)
    size = columns * (right - left) * _SIDE, rows * (_SIDE + _TEXT_HEIGHT) + 0.6
    figure = new_figure(size, dpi, "Nearest images of prototypes", details)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)

    strips = dict(render_strips(extractor, rankings, round(_SIDE * dpi), alpha, _GAP_SHARE))
    for panel in panels:
        panel.set(xlim=(left, right), ylim=(1, 0), aspect="equal")
        panel.axis("off")
    colors = palette(len(stats.prototypes)).tolist()
    for panel, prototype in zip(panels, prototypes):
        title = f"prototype {prototype} · {format_usage(stats, prototype)}"
        panel.set_title(title, loc="left", fontsize=7.5, color=TEXT_COLOR, pad=3)
        panel.add_patch(Rectangle((left, 0), _BAR_SHARE, 1, facecolor=colors[prototype]))
        _draw_strip(panel, strips.get(prototype, _EMPTY), [score for _, score in rankings[prototype]])
    return figure


def _draw_strip(panel: Axes, strip: Tensor, scores: Sequence[float]) -> None:
    """Draw images side by side, one unit high, with their scores below."""
    width = strip.shape[1] / strip.shape[0]
    panel.imshow(strip.numpy(), extent=(0, width, 1, 0), interpolation="antialiased")
    for rank, score in enumerate(scores):
        x = rank * width / len(scores) + 0.5
        panel.text(x, 1.03, f"{score:.3f}", fontsize=7, color=MUTED_COLOR, ha="center", va="top")


def format_usage(stats: PrototypeStats, prototype: int) -> str:
    """Return a text such as `12% of images, 3.4% of the area`."""
    count = int(stats.image_counts[prototype])
    if not count:
        return "not used by any image"
    share, area = 100 * count / stats.num_images, 100 * float(stats.area[prototype]) / stats.num_images
    return f"{share:.2g}% of images, {area:.2g}% of the area".replace("1e+02", "100")
