"""Figure: images, and all their slots in colors."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.figure import Figure
from torch import Tensor

from models.grouping import occupied
from transfer.figures.looking import Observer
from transfer.figures.regions import fine_side, middle, seams, shrink, winners
from transfer.figures.sheet import PALE, Sheet, columns, shorten
from utils.visualization import palette

_CELL, _GAP, _MARGIN, _TOP, _FOOT = 1.7, 0.07, 0.25, 0.8, 0.3
"""Inches: a picture, the space between two, around the page, its title, below a pair."""
_OPACITY = 0.6
_LABELLED = 0.012
"""Share of the picture above which a region has its prototype's number written into it."""


def draw_maps(
    observer: Observer, images: Sequence[int], dpi: int, facts: str, prototypes: Sequence[int] | None = None
) -> Figure:
    """Each image above its slots; a prototype has one color throughout, its number in it.

    Args:
        prototypes: only these are colored; None for all.
    """
    pictures, maps, captions = _look(observer, images, round(_CELL * dpi))
    there = {number for one in maps for number in one.unique().tolist()}
    colors = _colors(maps, sorted(there & set(prototypes) if prototypes else there))
    height = 2 * _CELL + _GAP + _FOOT
    across = columns(len(maps), _CELL + _GAP, height)
    down = -(-len(maps) // across)
    sheet = Sheet(max(across * (_CELL + _GAP) + 2 * _MARGIN, 6.0), down * height + _TOP + _MARGIN - 0.1, dpi)
    sheet.title("Images and their slots; the numbers are the prototypes'", facts)
    for place, (picture, one, caption) in enumerate(zip(pictures, maps, captions)):
        x, y = _MARGIN + place % across * (_CELL + _GAP), _TOP + place // across * height
        sheet.picture((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy(), x, y, _CELL, _CELL)
        sheet.picture(_paint(picture, one, colors), x, y + _CELL + _GAP, _CELL, _CELL)
        _write_numbers(sheet, one, colors, x, y + _CELL + _GAP)
        sheet.text(caption, x, y + 2 * _CELL + _GAP + 0.04, size=7, color=PALE)
    return sheet.figure


def _look(observer: Observer, images: Sequence[int], about: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Pictures (3, side, side) in 0..1, the winners at their pixels (side, side), captions."""
    pictures, maps, captions = [], [], []
    for seen in observer.look(images, "drawing"):
        side = fine_side(seen.scores.shape[2], min(about, seen.images.shape[2]))
        pictures += list(shrink(seen.images, side))
        maps += [winners(scores, side).cpu() for scores in seen.scores]
        for number, used in zip(seen.numbers.tolist(), occupied(seen.scores).sum(dim=1).tolist()):
            name = shorten(observer.squares.name(number).rpartition("/")[2], 17)
            captions.append(f"{used} slot{'s' * (used > 1)} · {name}")
    return pictures, maps, captions


def _colors(maps: list[Tensor], prototypes: Sequence[int]) -> dict[int, Tensor]:
    """A color (3,) for each prototype; the first of the palette, which differ most, go to the largest areas."""
    area = {prototype: sum(int((one == prototype).sum()) for one in maps) for prototype in prototypes}
    order = sorted(area, key=lambda prototype: -area[prototype])
    return dict(zip(order, palette(len(order))))


def _paint(picture: Tensor, won: Tensor, colors: dict[int, Tensor]) -> np.ndarray:
    """Colors over the gray image, a white line where slots meet: (side, side, 3) uint8."""
    gray = picture.mean(dim=0, keepdim=True).expand_as(picture)
    painted = gray * 0.6
    for prototype in won.unique().tolist():
        region = won == prototype
        if prototype in colors:
            color = _OPACITY * colors[prototype][:, None, None] + (1 - _OPACITY) * gray
            painted = torch.where(region, color, painted)
    painted = torch.where(seams(won, max(1, round(won.shape[0] / 250))), 1.0, painted)
    return (painted * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _write_numbers(sheet: Sheet, won: Tensor, colors: dict[int, Tensor], x: float, y: float) -> None:
    side = won.shape[0]
    for prototype in set(won.unique().tolist()) & colors.keys():
        region = won == prototype
        if region.float().mean() >= _LABELLED:
            row, column = middle(region)
            words = sheet.text(
                str(prototype),
                x + (column + 0.5) / side * _CELL,
                y + (row + 0.5) / side * _CELL,
                size=6.5,
                color="white",
                ha="center",
                va="center",
                weight="bold",
            )
            words.set_path_effects([patheffects.withStroke(linewidth=1.5, foreground="black")])
