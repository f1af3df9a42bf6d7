"""Figure: how many slots images have, and how often each prototype is used."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from transfer.figures.layout import TEXT_COLOR, new_figure
from transfer.figures.prototype_stats import PrototypeStats
from utils.visualization import palette

_BAR_COLOR, _LINE_COLOR = "#4477aa", "#cc3311"
_MAX_NUMBERED = 48
"""Number of prototypes up to which each bar is labeled with its number."""
_ROUND_STEPS = (1, 2, 5, 10)
"""Distances of ticks, times a power of ten."""


def draw_usage(stats: PrototypeStats, dpi: int, details: str) -> Figure:
    """Draw the histogram of slots per image, and for each used prototype its share of images and of the area."""
    title = f"{len(stats.used)} of {len(stats.prototypes)} prototypes are used"
    figure = new_figure((11, 5.2), dpi, title, f"{details} · perplexity of the areas {stats.perplexity:.1f}")
    panels = figure.subplot_mosaic([["slots", "images"], ["slots", "area"]], width_ratios=(1, 1.9))
    counts = stats.image_counts.cpu().numpy()
    order = np.argsort(-counts, kind="stable")[: len(stats.used)]
    _draw_histogram(panels["slots"], stats.slots_histogram.cpu().numpy(), stats.slots_per_image)
    _draw_bars(panels["images"], 100 * counts / stats.num_images, order, "share of images that use it")
    _draw_bars(panels["area"], 100 * stats.area.cpu().numpy() / stats.num_images, order, "share of the area")
    numbered = len(order) <= _MAX_NUMBERED
    panels["area"].set_xlabel("prototype, most used first" if numbered else "rank of the prototype by usage")
    return figure


def _draw_histogram(axes: Axes, histogram: np.ndarray, mean: float) -> None:
    """Draw how many images have 0, 1, ... slots, and the mean."""
    nonzero = histogram.nonzero()[0]
    first, last = nonzero[0], nonzero[-1]
    axes.bar(np.arange(len(histogram)), histogram, width=0.85, color=_BAR_COLOR)
    axes.axvline(mean, color=_LINE_COLOR, linewidth=1)
    axes.set(xlim=(first - 1.2, last + 1.2), ylim=(0, 1.12 * histogram.max()))
    axes.set(xlabel="slots in an image", ylabel="images")
    left = mean > (first + last) / 2
    axes.annotate(
        f"mean {mean:.1f}",
        (mean, 1),
        (-4 if left else 4, -3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        color=_LINE_COLOR,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_ROUND_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=_ROUND_STEPS))
    _style_axes(axes)


def _draw_bars(axes: Axes, shares: np.ndarray, order: np.ndarray, title: str) -> None:
    """Draw a bar for each prototype in `order`, in its color, labeled with its number if there is room.

    Args:
        axes: to draw in.
        shares: (K,) of each prototype in percent.
        order: numbers of the prototypes.
        title: of the axes.
    """
    count = len(order)
    ranks = np.arange(1, count + 1)
    colors = palette(len(shares)).numpy()[order]
    axes.bar(ranks, shares[order], width=0.85 if count <= _MAX_NUMBERED else 1, color=colors)
    axes.set(xlim=(0.2, count + 0.8), ylim=(0, None))
    axes.set_title(title, fontsize=9, loc="left", color=TEXT_COLOR)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=_ROUND_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}%"))
    _style_axes(axes)
    if count <= _MAX_NUMBERED:
        axes.set_xticks(ranks, [str(prototype) for prototype in order])
        axes.tick_params(axis="x", length=0, labelsize=8 if count <= 24 else 6)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_ROUND_STEPS))


def _style_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
