"""Figure: how many slots an image uses, and how often each prototype is used."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from transfer.figures.sheet import INK, PALE
from transfer.figures.survey import Survey

_BARS, _LINE = "#4477aa", "#cc3311"
_NUMBERED = 48
"""Prototypes, up to which each bar has a number."""


def draw_usage(survey: Survey, dpi: int, facts: str) -> Figure:
    """Slots an image on the left; on the right the shares of images and of the area of each prototype in use."""
    figure = Figure(figsize=(11, 5.2), dpi=dpi, facecolor="white")
    grid = figure.add_gridspec(
        2, 2, width_ratios=(1, 1.9), left=0.07, right=0.98, top=0.83, bottom=0.11, wspace=0.22, hspace=0.3
    )
    used = len(survey.used)
    title = f"{used} of {len(survey.prototypes)} prototypes are used"
    figure.text(0.023, 0.965, title, fontsize=12, weight="bold", va="top")
    effective = f"the area is divided as among {survey.effective:.1f} equal ones"
    figure.text(0.023, 0.915, f"{facts} · {effective}", fontsize=8.5, color=PALE, va="top", parse_math=False)
    _draw_histogram(figure.add_subplot(grid[:, 0]), survey)
    order = np.argsort(-survey.images_using.cpu().numpy(), kind="stable")[:used]
    images, area = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    _draw_bars(images, 100 * survey.images_using.cpu().numpy() / survey.images, order, "% of images that use it")
    _draw_bars(area, 100 * survey.area.cpu().numpy() / survey.images, order, "% of the area it wins")
    area.set_xlabel("prototype, most used first" if used <= _NUMBERED else "prototypes in use, most used first")
    return figure


def _draw_histogram(axes: Any, survey: Survey) -> None:
    histogram = survey.slots_histogram.cpu().numpy()
    counts = histogram.nonzero()[0]
    axes.bar(np.arange(len(histogram)), histogram, width=0.85, color=_BARS)
    mean = survey.slots_per_image
    axes.axvline(mean, color=_LINE, linewidth=1)
    axes.set(xlim=(counts[0] - 1.2, counts[-1] + 1.2), ylim=(0, 1.12 * histogram.max()))
    left = mean > (counts[0] + counts[-1]) / 2
    words = {"xytext": (-4 if left else 4, -3), "textcoords": "offset points", "ha": "right" if left else "left"}
    axes.annotate(f"mean {mean:.1f}", (mean, 1), xycoords=("data", "axes fraction"), va="top", color=_LINE, **words)
    axes.set(xlabel="slots in an image", ylabel="images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(axes)


def _draw_bars(axes: Any, shares: np.ndarray, order: np.ndarray, label: str) -> None:
    count = len(order)
    places = np.arange(count)
    axes.bar(places, shares[order], width=0.85 if count <= _NUMBERED else 1, color=_BARS)
    axes.set(xlim=(-0.8, count - 0.2), ylim=(0, None))
    axes.set_title(label, fontsize=9, loc="left", color=INK)
    if count <= _NUMBERED:
        axes.set_xticks(places, [str(prototype) for prototype in order], fontsize=8 if count <= 24 else 6)
        axes.tick_params(axis="x", length=0)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
