"""Draw strips of images with captions, a panel each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from transfer.figures.layout import MUTED_COLOR, TEXT_COLOR, grid_shape, new_figure
from transfer.figures.tiles import to_pixels

_SIDE, _TEXT_HEIGHT, _GAP_SHARE = 1.3, 0.4, 0.04
"""Inches: the side of an image, and the height of the text above and below it; the gap as a share of the side."""
_MAX_PIXELS = 600
"""Largest side of an image in pixels."""


class Strip(NamedTuple):
    """Images side by side."""

    title: str
    tiles: Sequence[Tensor]
    """(3, side, side) in [0, 1] each."""
    captions: Sequence[str]
    """A text below each image; none for no texts."""


def pixels_per_image(dpi: int) -> int:
    """Return about the side in pixels that an image of a strip has in the figure."""
    return min(round(_SIDE * dpi), _MAX_PIXELS)


def draw_strips(strips: Sequence[Strip], dpi: int, title: str, details: str) -> Figure:
    """Draw the strips as panels in rows and columns."""
    length = max(len(strip.tiles) for strip in strips)
    width = length * (1 + _GAP_SHARE)
    height = _SIDE + (_TEXT_HEIGHT if any(strip.captions for strip in strips) else _TEXT_HEIGHT / 2)
    rows, columns = grid_shape(len(strips), width * _SIDE, height)
    figure = new_figure((columns * width * _SIDE, rows * height + 0.6), dpi, title, details)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set(xlim=(0, width), ylim=(1, 0), aspect="equal")
        panel.axis("off")
    for panel, strip in zip(panels, strips):
        panel.set_title(strip.title, loc="left", fontsize=7.5, color=TEXT_COLOR, pad=3, parse_math=False)
        panel.imshow(
            _join_tiles(strip.tiles).numpy(),
            extent=(0, len(strip.tiles) * (1 + _GAP_SHARE), 1, 0),
            interpolation="antialiased",
        )
        for number, caption in enumerate(strip.captions):
            x = number * (1 + _GAP_SHARE) + 0.5
            panel.text(x, 1.03, caption, fontsize=7, color=MUTED_COLOR, ha="center", va="top")
    return figure


def _join_tiles(tiles: Sequence[Tensor]) -> Tensor:
    """Return images (3, side, side) in [0, 1] side by side, each with a white gap: (side, width, 3) uint8."""
    side = tiles[0].shape[1]
    white = torch.ones(3, side, round(_GAP_SHARE * side))
    return to_pixels(torch.cat([part for tile in tiles for part in (tile, white)], dim=2))
