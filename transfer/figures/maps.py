"""Figure: images and their slot maps, with a color and a number for each prototype."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from models.grouping import occupied
from transfer.figures.extractor import FeatureExtractor
from transfer.figures.layout import MUTED_COLOR, grid_shape, new_figure, shorten
from transfer.figures.regions import (
    assign_pixels,
    downsample,
    label_position,
    region_boundaries,
    region_side,
    to_uint8,
)
from utils.visualization import palette

_SIDE, _TEXT_HEIGHT, _GAP = 1.7, 0.22, 0.06
"""Inches: the side of an image, the height of its caption, and the space between images."""
_OPACITY = 0.6
_MIN_LABELED_AREA = 0.012
"""Share of the image above which a region is labeled with the number of its prototype."""


class SlotMap(NamedTuple):
    """An image with the prototype of each pixel."""

    image: Tensor
    """(3, side, side) in 0..1."""
    assignment: Tensor
    """(side, side) int64."""
    caption: str


def draw_maps(
    extractor: FeatureExtractor, indices: Sequence[int], dpi: int, details: str, prototypes: Sequence[int] | None = None
) -> Figure:
    """Draw each image above its slot map; a prototype has the same color in all maps.

    Args:
        extractor: gives the images and their scores.
        indices: of the images.
        dpi: pixels per inch.
        details: the text below the figure.
        prototypes: color only these; None for all.
    """
    maps = compute_slot_maps(extractor, indices, round(_SIDE * dpi))
    colors = assign_colors([slot_map.assignment for slot_map in maps], prototypes)
    height = 2 * _SIDE + _GAP + _TEXT_HEIGHT
    rows, columns = grid_shape(len(maps), _SIDE + _GAP, height)
    figure = new_figure((columns * (_SIDE + _GAP), rows * height + 0.6), dpi, "Images and their slot maps", details)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for panel, slot_map in zip(panels, maps):
        _draw_map(panel, slot_map, colors)
    return figure


def compute_slot_maps(extractor: FeatureExtractor, indices: Sequence[int], target_side: int) -> list[SlotMap]:
    """Return the slot maps of images, about `target_side` pixels large."""
    maps = []
    for batch in extractor.extract(indices, "rendering"):
        side = region_side(batch.scores.shape[2], min(target_side, batch.images.shape[2]))
        num_slots = occupied(batch.scores).sum(dim=1).tolist()
        images = downsample(batch.images, side)
        for index, image, scores, count in zip(batch.indices.tolist(), images, batch.scores, num_slots):
            name = shorten(extractor.crops.name(index).rpartition("/")[2], 17)
            caption = f"{count} slot{'s' * (count > 1)} · {name}"
            maps.append(SlotMap(image, assign_pixels(scores, side).cpu(), caption))
    return maps


def assign_colors(assignments: Sequence[Tensor], prototypes: Sequence[int] | None = None) -> dict[int, Tensor]:
    """Return the color (3,) of each prototype in the maps; the largest get the first colors, which differ most."""
    numbers, areas = torch.cat([assignment.flatten() for assignment in assignments]).unique(return_counts=True)
    order = numbers[areas.argsort(descending=True, stable=True)].tolist()
    shown = [prototype for prototype in order if prototypes is None or prototype in prototypes]
    return dict(zip(shown, palette(len(shown))))


def _draw_map(panel: Axes, slot_map: SlotMap, colors: Mapping[int, Tensor]) -> None:
    """Draw the image above its map, with the caption below and the numbers of the prototypes in their regions."""
    side = slot_map.assignment.shape[0]
    gap = torch.full((round(side * _GAP / _SIDE), side, 3), 255, dtype=torch.uint8)
    column = torch.cat([to_uint8(slot_map.image), gap, to_uint8(render_slot_map(slot_map, colors))])
    panel.imshow(column.numpy(), interpolation="antialiased")
    # The layout ignores the texts, which would widen the columns; the axes leave room for the caption.
    panel.set_ylim(len(column) + side * _TEXT_HEIGHT / _SIDE, -0.5)
    style: dict[str, Any] = {"fontsize": 6.5, "in_layout": False}
    caption_y = len(column) + 0.02 * side
    panel.text(0, caption_y, slot_map.caption, va="top", color=MUTED_COLOR, parse_math=False, **style)
    style |= {"weight": "bold", "color": "white", "ha": "center", "va": "center"}
    style["path_effects"] = [patheffects.withStroke(linewidth=1.5, foreground="black")]
    for prototype in set(slot_map.assignment.unique().tolist()) & colors.keys():
        region = slot_map.assignment == prototype
        if region.float().mean() >= _MIN_LABELED_AREA:
            row, x = label_position(region)
            panel.text(x, row + side + len(gap), str(prototype), **style)


def render_slot_map(slot_map: SlotMap, colors: Mapping[int, Tensor]) -> Tensor:
    """Blend the gray image with the colors of its prototypes, with white boundaries: (3, side, side) in 0..1."""
    gray = slot_map.image.mean(dim=0, keepdim=True).expand_as(slot_map.image)
    colored = gray * 0.6
    for prototype in set(slot_map.assignment.unique().tolist()) & colors.keys():
        blended = _OPACITY * colors[prototype][:, None, None] + (1 - _OPACITY) * gray
        colored = torch.where(slot_map.assignment == prototype, blended, colored)
    boundaries = region_boundaries(slot_map.assignment, max(1, round(slot_map.assignment.shape[0] / 250)))
    return torch.where(boundaries, 1.0, colored)
