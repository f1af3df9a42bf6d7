"""Two views of one image onto the same pixels.

A view is a crop, mirrored left-right if `flip`, then turned by `turns` counter-clockwise quarter turns.
Boxes are x1, y1, x2, y2.
"""

import math

import numpy as np

from tests.reference.grouping import Array

Box = tuple[float, float, float, float]


def flip_box(box: Box, side: float = 1.0) -> Box:
    """Left-right mirror of a box in a square of `side`."""
    x1, y1, x2, y2 = box
    return side - x2, y1, side - x1, y2


def turn_box(box: Box, side: float = 1.0) -> Box:
    """A quarter turn counter-clockwise: (x1, y1, x2, y2) to (y1, S - x2, y2, S - x1)."""
    x1, y1, x2, y2 = box
    return y1, side - x2, y2, side - x1


def overlap(crop_a: Box, crop_b: Box, flip: bool = False, turns: int = 0) -> tuple[Box, bool]:
    """The intersection of two crops of one image in view a's own frame (0..1), and whether there is one.

    `flip` and `turns` are view a's. Without an intersection of positive area the box is the whole view.
    """
    ax1, ay1, ax2, ay2 = (float(x) for x in crop_a)
    bx1, by1, bx2, by2 = (float(x) for x in crop_b)
    x1, y1, x2, y2 = max(ax1, bx1), max(ay1, by1), min(ax2, bx2), min(ay2, by2)
    if x2 <= x1 or y2 <= y1:
        return (0.0, 0.0, 1.0, 1.0), False
    width, height = ax2 - ax1, ay2 - ay1
    box = (x1 - ax1) / width, (y1 - ay1) / height, (x2 - ax1) / width, (y2 - ay1) / height
    if flip:
        box = flip_box(box)
    for _ in range(turns):
        box = turn_box(box)
    return box, True


def bilinear(plane: Array, y: float, x: float) -> float:
    """The value of an (H,W) plane at cell coordinates (0 is the first cell's center), clamped at the border.

    0 further than one cell outside.
    """
    H, W = plane.shape
    if y < -1 or y > H or x < -1 or x > W:
        return 0.0
    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * plane[top, left] + dx * plane[top, right]
    lower = (1 - dx) * plane[bottom, left] + dx * plane[bottom, right]
    return float((1 - dy) * upper + dy * lower)


def roi_align(planes: Array, box: Box, rows: int, columns: int) -> Array:
    """RoIAlign (`aligned=True`, adaptive sampling, scale 1) of (C,H,W) on a box in cells: (C,rows,columns).

    Coordinates shift by half a cell; every bin averages ceil(bin size) samples a side.
    """
    x1, y1, x2, y2 = (edge - 0.5 for edge in box)
    bin_height, bin_width = (y2 - y1) / rows, (x2 - x1) / columns
    down, across = max(math.ceil(bin_height), 1), max(math.ceil(bin_width), 1)
    result = np.zeros((planes.shape[0], rows, columns))
    for c in range(planes.shape[0]):
        for i in range(rows):
            for j in range(columns):
                total = 0.0
                for v in range(down):
                    for u in range(across):
                        y = y1 + (i + (v + 0.5) / down) * bin_height
                        x = x1 + (j + (u + 0.5) / across) * bin_width
                        total += bilinear(planes[c], y, x)
                result[c, i, j] = total / (down * across)
    return result


def flip_planes(planes: Array) -> Array:
    """Left-right mirror of (C,H,W); its own inverse."""
    result = np.zeros(planes.shape)
    C, H, W = planes.shape
    for c in range(C):
        for i in range(H):
            for j in range(W):
                result[c, i, j] = planes[c, i, W - 1 - j]
    return result


def turn_planes(planes: Array) -> Array:
    """A quarter turn counter-clockwise of (C,H,W) to (C,W,H): the point (x, y) goes to (y, W - 1 - x)."""
    C, H, W = planes.shape
    result = np.zeros((C, W, H))
    for c in range(C):
        for y in range(H):
            for x in range(W):
                result[c, W - 1 - x, y] = planes[c, y, x]
    return result


def see(planes: Array, flip: bool, turns: int) -> Array:
    """What a view shows of its crop: the mirror first, then the quarter turns."""
    planes = flip_planes(planes) if flip else np.asarray(planes, dtype=np.float64)
    for _ in range(turns):
        planes = turn_planes(planes)
    return planes


def unsee(planes: Array, flip: bool, turns: int) -> Array:
    """The inverse of `see`: the turns first (three more complete each circle), then the mirror."""
    for _ in range(3 * turns):
        planes = turn_planes(planes)
    return flip_planes(planes) if flip else planes


def align(planes: Array, box: Box, flip: bool = False, turns: int = 0) -> Array:
    """RoIAlign of (C,H,W) on a box (0..1, the view's own frame) to the full grid; un-turned, un-flipped."""
    planes = np.asarray(planes, dtype=np.float64)
    _, H, W = planes.shape
    x1, y1, x2, y2 = (float(edge) for edge in box)
    return unsee(roi_align(planes, (x1 * W, y1 * H, x2 * W, y2 * H), H, W), flip, turns)
