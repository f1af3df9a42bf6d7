"""The figure of a probe's predictions: tiles with gaps in named columns, and a legend of the shown classes."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import ndimage

from transfer.probe.labeled_features import VOID
from transfer.probe.prediction_figure import NO_CLASS, draw_predictions
from utils.visualization import palette

Array = np.ndarray[Any, np.dtype[Any]]


class Box(NamedTuple):
    """A square of one color in a figure, in pixels."""

    top: int
    left: int
    bottom: int
    right: int


def find_boxes(figure: Array, color: Any) -> list[Box]:
    """Return the filled squares of a color that are at least 10 pixels high, from top to bottom."""
    regions, _ = ndimage.label((figure == np.asarray(color)).all(axis=2))
    boxes = [
        Box(rows.start, columns.start, rows.stop, columns.stop)
        for number, (rows, columns) in enumerate(ndimage.find_objects(regions), 1)
        if 10 <= rows.stop - rows.start == columns.stop - columns.start and (regions[rows, columns] == number).all()
    ]
    return sorted(boxes)


def class_colors(count: int) -> Array:
    return (palette(count) * 255).round().byte().numpy()


def constant_maps(values: list[int], size: int) -> Array:
    return np.array(values)[:, None, None] * np.ones((size, size), dtype=np.int64)


def draw(
    size: int, count: int, labels: list[int], predictions: list[int], classes: list[str]
) -> tuple[Array, list[Array]]:
    """Draw images of one color each, whose label maps have one class each; return the figure and the images' colors."""
    colors = [np.array([3 * number + 1, 7, 250], dtype=np.uint8) for number in range(count)]
    images = np.stack([np.broadcast_to(color, (size, size, 3)) for color in colors])
    maps = {"labels": constant_maps(labels, size), "prediction": constant_maps(predictions, size)}
    return np.array(draw_predictions(images, maps, classes)), colors


@pytest.mark.parametrize(
    ("size", "side", "count"), [(16, 224, 1), (240, 240, 4), (240, 240, 5), (600, 512, 1), (64, 224, 8)]
)
def test_image_labels_and_prediction_are_in_a_row_with_gaps(size: int, side: int, count: int) -> None:
    classes = [f"class {number}" for number in range(2 * count)]
    figure, image_colors = draw(size, count, list(range(count)), list(range(count, 2 * count)), classes)
    palette_colors = class_colors(2 * count)
    tiles = []
    for number, color in enumerate(image_colors):
        row = [find_boxes(figure, color)[0]]
        row += [find_boxes(figure, palette_colors[label])[0] for label in (number, count + number)]
        assert [(box.bottom - box.top, box.right - box.left) for box in row] == [(side, side)] * 3
        assert len({box.top for box in row}) == 1
        assert row[0].right < row[1].left < row[1].right < row[2].left
        tiles += row
    for top, left, bottom, right in tiles:  # a white border of several pixels
        frame = figure[top - 3 : bottom + 3, left - 3 : right + 3].copy()
        frame[3:-3, 3:-3] = 255
        assert frame.shape == (side + 6, side + 6, 3)
        assert (frame == 255).all()


def test_many_images_are_in_two_blocks_so_that_the_figure_is_not_high() -> None:
    figure, _ = draw(224, 8, [0] * 8, [1] * 8, ["a", "b"])
    assert figure.shape[0] < figure.shape[1]


@pytest.mark.parametrize(("num_classes", "size"), [(2, 64), (27, 320), (150, 64)])
def test_legend_has_the_color_of_every_shown_class_and_of_no_other(num_classes: int, size: int) -> None:
    shown = [0, *range(1, num_classes, 2)]
    labels = np.resize([*shown, VOID, NO_CLASS], (1, size, size))
    figure = np.array(
        draw_predictions(
            np.zeros((1, size, size, 3), dtype=np.uint8),
            {"labels": labels, "prediction": constant_maps([0], size)},
            [f"class {number}" for number in range(num_classes)],
        )
    )
    colors = class_colors(num_classes)
    side = max(size, 224)
    below = figure[side + side // 8 :]  # the titles and the tiles
    swatches = [find_boxes(below, color) for color in (*colors[shown], (0, 0, 0), (128, 128, 128))]
    assert all(boxes for boxes in swatches)
    order = [boxes[-1] for boxes in swatches]
    assert order == sorted(order, key=lambda box: (box.left, box.top))  # read from top to bottom
    for top, left, bottom, right in order:
        assert (below[top:bottom, left - 3 : left] == 255).all()  # no text runs into the next column
        assert (below[top:bottom, right : right + 3 * (right - left)] < 100).any()  # a name
    hidden = set(range(num_classes)) - set(shown)
    assert not any(find_boxes(below, colors[label]) for label in hidden)


def test_legend_shows_the_names_of_the_classes() -> None:
    figures = [draw(224, 1, [0], [1], classes)[0] for classes in (["cat", "dog"], ["cat", "dog"], ["cat", "sky"])]
    assert np.array_equal(figures[0], figures[1])
    rows = np.flatnonzero((figures[0] != figures[2]).any(axis=(1, 2)))
    (swatch,) = (box for box in find_boxes(figures[0], class_colors(2)[1]) if box.bottom - box.top < 100)
    assert swatch.top - 10 < rows.min() < rows.max() < swatch.bottom + 10
