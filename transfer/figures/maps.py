"""Figure: images and their slot maps, with a color and a number for each prototype."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from models.grouping import occupied
from transfer.figures.extractor import SlotExtractor
from transfer.figures.labels import LabelPlacer
from transfer.figures.layout import MUTED_COLOR, grid_shape, new_figure, shorten
from transfer.figures.regions import connected_regions, pixels_by_depth, region_side, resample
from transfer.figures.tiles import to_pixels
from utils.visualization import assign_pixels, render_slot_map

_SIDE, _TEXT_HEIGHT, _GAP = 1.7, 0.22, 0.06
"""Inches: the side of an image, the height of its caption, and the space between images."""
_MAX_PIXELS = 600
"""Largest side of an image in pixels."""
_FONT_SIZE, _STROKE_WIDTH = 6.5, 1.5
"""Points."""
MIN_NUMBERED_AREA = 0.01
"""Share of the image from which on a connected region is labeled with the number of its prototype."""


class SlotMap(NamedTuple):
    """An image with the prototype of each pixel."""

    image: Tensor
    """(3, side, side) in 0..1."""
    assignment: Tensor
    """(side, side) int64."""
    caption: str


def draw_maps(
    extractor: SlotExtractor, indices: Sequence[int], dpi: int, details: str, prototypes: Sequence[int] | None = None
) -> Figure:
    """Draw each image above its slot map; a prototype has the same color in all figures.

    Args:
        extractor: gives the images and their scores.
        indices: of the images.
        dpi: pixels per inch.
        details: the text below the figure.
        prototypes: color only these; None for all.
    """
    maps = compute_slot_maps(extractor, indices, min(round(_SIDE * dpi), _MAX_PIXELS))
    details = f"{details}\nregions of at least {MIN_NUMBERED_AREA:.0%} of an image are numbered"
    height = 2 * _SIDE + _GAP + _TEXT_HEIGHT
    rows, columns = grid_shape(len(maps), _SIDE + _GAP, height)
    figure = new_figure((columns * (_SIDE + _GAP), rows * height + 0.6), dpi, "Images and their slot maps", details)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for panel, slot_map in zip(panels, maps):
        _draw_map(panel, slot_map, prototypes)
    return figure


def compute_slot_maps(extractor: SlotExtractor, indices: Sequence[int], target_side: int) -> list[SlotMap]:
    """Return the slot maps of images, about `target_side` pixels large."""
    maps = []
    for batch in extractor.extract(indices, "rendering"):
        side = region_side(batch.scores.shape[2], target_side)
        num_slots = occupied(batch.scores).sum(dim=1).tolist()
        images = resample(batch.images, side)
        for index, image, scores, count in zip(batch.indices.tolist(), images, batch.scores, num_slots):
            name = shorten(extractor.crops.name(index).rpartition("/")[2], 17)
            caption = f"{count} slot{'s' * (count > 1)} · {name}"
            maps.append(SlotMap(image, assign_pixels(scores, side).cpu(), caption))
    return maps


def _draw_map(panel: Axes, slot_map: SlotMap, prototypes: Collection[int] | None) -> None:
    """Draw the image above its map, with the caption below and the numbers of the prototypes in their regions."""
    side = slot_map.assignment.shape[0]
    gap = torch.ones(3, round(side * _GAP / _SIDE), side)
    colored = render_slot_map(slot_map.image, slot_map.assignment, prototypes)
    column = to_pixels(torch.cat([slot_map.image, gap, colored], dim=1))
    panel.imshow(column.numpy(), interpolation="antialiased")
    # The layout ignores the texts, which would widen the columns; the axes leave room for the caption.
    panel.set_ylim(len(column) + side * _TEXT_HEIGHT / _SIDE, -0.5)
    style: dict[str, Any] = {"fontsize": _FONT_SIZE, "in_layout": False}
    caption_y = len(column) + 0.02 * side
    panel.text(0, caption_y, slot_map.caption, va="top", color=MUTED_COLOR, parse_math=False, **style)
    style |= {"weight": "bold", "color": "white", "ha": "center", "va": "center_baseline"}
    style["path_effects"] = [patheffects.withStroke(linewidth=_STROKE_WIDTH, foreground="black")]
    for prototype, (x, y) in place_numbers(slot_map.assignment, prototypes):
        panel.text(x, y + side + gap.shape[1], str(prototype), **style)


def place_numbers(
    assignment: Tensor, prototypes: Collection[int] | None = None
) -> list[tuple[int, tuple[float, float]]]:
    """Place the number of its prototype in each connected region of at least `MIN_NUMBERED_AREA`, largest first.

    Args:
        assignment: (side, side) int64, the prototype of each pixel.
        prototypes: leave out the others; None for all.

    Returns:
        Pairs of prototype and position (x, y), a pixel of the region: the one farthest from its border at which the
        number overlaps no other, if there is one.
    """
    placer = LabelPlacer(_FONT_SIZE, _STROKE_WIDTH / 2, points_per_unit=72 * _SIDE / len(assignment))
    numbers = []
    for prototype, region in connected_regions(assignment, MIN_NUMBERED_AREA * assignment.numel()):
        if prototypes is None or prototype in prototypes:
            pixels = pixels_by_depth(region)
            position = placer.place(prototype, pixels)
            x, y = pixels[0] if position is None else position
            numbers.append((prototype, (float(x), float(y))))
    return numbers
