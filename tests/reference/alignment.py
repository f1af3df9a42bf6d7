"""Two views of one image on the same pixels.

A view is a crop, flipped left to right if `flip`, then rotated by `rotation` counter-clockwise quarter turns.
Boxes are x1, y1, x2, y2.
"""

import math

import numpy as np

from tests.reference.grouping import Array

Box = tuple[float, float, float, float]


def overlap_box(crop_a: Box, crop_b: Box, flip: bool = False, rotation: int = 0) -> tuple[Box, bool]:
    """Locate the intersection of two crops in view a (0..1), whose flip and rotation are given.

    Without an intersection of positive area the box is the whole view, and the second result is false.
    """
    ax1, ay1, ax2, ay2 = (float(x) for x in crop_a)
    bx1, by1, bx2, by2 = (float(x) for x in crop_b)
    x1, y1, x2, y2 = max(ax1, bx1), max(ay1, by1), min(ax2, bx2), min(ay2, by2)
    if x2 <= x1 or y2 <= y1:
        return (0.0, 0.0, 1.0, 1.0), False
    width, height = ax2 - ax1, ay2 - ay1
    x1, y1, x2, y2 = (x1 - ax1) / width, (y1 - ay1) / height, (x2 - ax1) / width, (y2 - ay1) / height
    if flip:
        x1, x2 = 1 - x2, 1 - x1
    for _ in range(rotation):
        x1, y1, x2, y2 = y1, 1 - x2, y2, 1 - x1
    return (x1, y1, x2, y2), True


def bilinear(plane: Array, y: float, x: float) -> float:
    """Interpolate a plane (H, W) at cell coordinates, where 0 is the center of the first cell.

    Positions are clamped to the plane; the result is 0 further than one cell outside.
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
    """RoIAlign (`aligned=True`, adaptive sampling, scale 1) of (C, H, W) on a box in cells: (C, rows, columns).

    Coordinates shift by half a cell; every output averages ceil(its size in cells) samples in each direction.
    """
    x1, y1, x2, y2 = (edge - 0.5 for edge in box)
    height, width = (y2 - y1) / rows, (x2 - x1) / columns
    down, across = max(math.ceil(height), 1), max(math.ceil(width), 1)
    result = np.zeros((planes.shape[0], rows, columns))
    for c, i, j in np.ndindex(*result.shape):
        total = 0.0
        for v in range(down):
            for u in range(across):
                y = y1 + (i + (v + 0.5) / down) * height
                x = x1 + (j + (u + 0.5) / across) * width
                total += bilinear(planes[c], y, x)
        result[c, i, j] = total / (down * across)
    return result


def apply_pose(planes: Array, flip: bool, rotation: int) -> Array:
    """Flip (C, H, W), then rotate it counter-clockwise: a crop becomes a view."""
    planes = np.flip(planes, 2) if flip else planes
    return np.rot90(planes, rotation, (1, 2)).copy()


def undo_pose(planes: Array, flip: bool, rotation: int) -> Array:
    """The inverse of `apply_pose`: the rotation first, then the flip."""
    planes = np.rot90(planes, -rotation, (1, 2))
    return (np.flip(planes, 2) if flip else planes).copy()


def align(planes: Array, box: Box, flip: bool = False, rotation: int = 0, size: tuple[int, int] | None = None) -> Array:
    """RoIAlign of (C, H, W) on a box of the view (0..1) to `size`, by default (H, W); without flip and rotation."""
    planes = np.asarray(planes, dtype=np.float64)
    _, H, W = planes.shape
    x1, y1, x2, y2 = (float(edge) for edge in box)
    return undo_pose(roi_align(planes, (x1 * W, y1 * H, x2 * W, y2 * H), *(size or (H, W))), flip, rotation)
