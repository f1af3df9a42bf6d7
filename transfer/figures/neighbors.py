"""Figure: the nearest images of prototypes, a row each, the prototype's region lit up."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from transfer.figures.looking import Observer
from transfer.figures.pictures import lit_regions
from transfer.figures.sheet import PALE, Sheet, columns
from transfer.figures.survey import Survey

_CELL, _GAP, _MARGIN, _TOP, _HEAD, _FOOT = 1.3, 0.05, 0.25, 0.8, 0.22, 0.22
"""Inches: a picture, the space between two, around the page, its title, above a row and below it."""

_NOTHING = np.full((1, 1, 3), 238, dtype=np.uint8)
"""In place of the pictures of a prototype that no image uses."""


def draw_neighbors(
    observer: Observer, survey: Survey, prototypes: Sequence[int], alpha: float, dpi: int, facts: str
) -> Figure:
    """A row of nearest images for each of `prototypes`, with scores below; rows stand in blocks side by side."""
    nearest = {prototype: survey.nearest.of(prototype) for prototype in prototypes}
    longest = max(len(found) for found in nearest.values())
    block = max(longest * (_CELL + _GAP), 2.7) + _GAP + 0.15
    row = _HEAD + _CELL + _FOOT
    across = columns(len(prototypes), block, row)
    down = -(-len(prototypes) // across)
    width = max(across * block + 2 * _MARGIN - 0.2, 6.0)
    sheet = Sheet(width, down * row + _TOP + _MARGIN - 0.1, dpi)
    sheet.title("Nearest images of prototypes, and the region that each wins", facts)

    strips = _strips(observer, nearest, round(_CELL * dpi), alpha)
    for place, prototype in enumerate(prototypes):
        x, y = _MARGIN + place // down * block, _TOP + place % down * row
        sheet.text(f"{prototype}", x, y, size=9, weight="bold")
        indent = 0.09 * len(str(prototype)) + 0.1
        sheet.text(usage_in_words(survey, prototype), x + indent, y + 0.015, size=7.5, color=PALE)
        strip = strips.get(prototype, _NOTHING)
        sheet.picture(strip, x, y + _HEAD, _CELL * strip.shape[1] / strip.shape[0], _CELL)
        for rank, (_, score) in enumerate(nearest[prototype]):
            center = x + rank * (_CELL + _GAP) + _CELL / 2
            sheet.text(f"{score:.3f}", center, y + _HEAD + _CELL + 0.03, size=7, color=PALE, ha="center")
    return sheet.figure


def usage_in_words(survey: Survey, prototype: int) -> str:
    """Such as `in 12 % of images, 3.4 % of the area`."""
    using = survey.images_using[prototype].item()
    if not using:
        return "no image uses it"
    share, area = 100 * using / survey.images, 100 * survey.area[prototype].item() / survey.images
    return f"in {share:.2g} % of images, {area:.2g} % of the area".replace("1e+02", "100")


def _strips(
    observer: Observer, nearest: dict[int, list[tuple[int, float]]], about: int, alpha: float
) -> dict[int, np.ndarray]:
    """Each prototype's pictures side by side with white between: (side, width, 3) uint8; none for one without."""
    images = {prototype: [image for image, _ in found] for prototype, found in nearest.items()}
    pictures: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)
    for lit in lit_regions(observer, images, about, alpha):
        pictures[lit.prototype][lit.rank] = lit.picture
    strips = {}
    for prototype, ranked in pictures.items():
        side = ranked[0].shape[0]
        space = torch.full((side, round(side * _GAP / _CELL), 3), 255, dtype=torch.uint8)
        parts = [part for rank in sorted(ranked) for part in (ranked[rank], space)][:-1]
        strips[prototype] = torch.cat(parts, dim=1).numpy()
    return strips
