"""Draw images beside their labels and predictions in named columns, with a legend of the classes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from transfer.probe.labeled_features import VOID
from utils.visualization import palette

NO_CLASS = VOID + 1
"""The prediction at pixels of a cluster without a class."""

_SMALLEST_SIDE, _LARGEST_SIDE = 224, 512
"""Limits of the side of a tile in pixels. Smaller and larger images are resized, so that the text fits above them."""
_MAX_ROWS = 4
"""With more images than this, half of the rows are in a second block of columns."""


def draw_predictions(
    images: NDArray[np.uint8], label_maps: Mapping[str, NDArray[np.integer]], classes: Sequence[str]
) -> Image.Image:
    """Draw each image in a row with its label maps, and below them the name and color of each class in the maps.

    Args:
        images: (N, S, S, 3).
        label_maps: title of a column -> maps (N, S, S) of classes, VOID (drawn in black) and NO_CLASS (in gray).
        classes: names of all classes.
    """
    side = min(max(images.shape[1], _SMALLEST_SIDE), _LARGEST_SIDE)
    colors = np.zeros((NO_CLASS + 1, 3), dtype=np.uint8)
    colors[: len(classes)] = (palette(len(classes)) * 255).round().byte().numpy()
    colors[NO_CLASS] = 128
    columns = {"image": [_resize(image, side, Image.Resampling.BICUBIC) for image in images]}
    for title, maps in label_maps.items():
        columns[title] = [_resize(pixels, side, Image.Resampling.NEAREST) for pixels in colors[maps]]
    names = {**dict(enumerate(classes)), VOID: "void", NO_CLASS: "no class"}
    shown = np.unique(np.stack([*label_maps.values()])).tolist()
    tiles = _draw_columns(columns, side)
    legend = _draw_legend([(names[label], tuple(colors[label].tolist())) for label in shown], tiles.width, side)
    figure = Image.new("RGB", (tiles.width, tiles.height + legend.height), "white")
    figure.paste(tiles, (0, 0))
    figure.paste(legend, (0, tiles.height))
    return figure


def _resize(pixels: NDArray[np.uint8], side: int, resampling: Image.Resampling) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), resampling)


def _load_font(side: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font in proportion to the tiles, because a reader sees large figures scaled down."""
    return ImageFont.load_default(side / 12)


def _draw_columns(columns: Mapping[str, Sequence[Image.Image]], side: int) -> Image.Image:
    """Draw named columns of tiles with gaps, in one or two blocks next to each other."""
    count = len(columns["image"])
    rows = count if count <= _MAX_ROWS else math.ceil(count / 2)
    gap, title_height, font = side // 28, side // 8, _load_font(side)
    block_width = len(columns) * (side + gap) + 2 * gap
    size = (math.ceil(count / rows) * block_width - gap, title_height + rows * (side + gap) + gap)
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    for number, (title, tiles) in enumerate(columns.items()):
        for position, tile in enumerate(tiles):
            block, row = divmod(position, rows)
            left = gap + block * block_width + number * (side + gap)
            if row == 0:
                draw.text((left, title_height / 2), title, "black", font, anchor="lm")
            figure.paste(tile, (left, title_height + row * (side + gap)))
    return figure


def _draw_legend(entries: Sequence[tuple[str, tuple[int, ...]]], width: int, side: int) -> Image.Image:
    """Draw names with their colors in as many columns as fit, which are read from top to bottom."""
    gap, swatch, font = side // 28, side // 14, _load_font(side)
    entry_width = swatch + 4 * gap + math.ceil(max(font.getlength(name) for name, _ in entries))
    rows = math.ceil(len(entries) / max(1, (width - gap) // entry_width))
    height = swatch + gap
    figure = Image.new("RGB", (width, rows * height + gap), "white")
    draw = ImageDraw.Draw(figure)
    for number, (name, color) in enumerate(entries):
        left, top = gap + number // rows * entry_width, number % rows * height
        draw.rectangle((left, top, left + swatch - 1, top + swatch - 1), fill=color)
        draw.text((left + swatch + gap, top + swatch / 2), name, "black", font, anchor="lm")
    return figure
