"""The regions of slots in an image, as masks of pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

_OUTLINE_COLOR = (1.0, 0.78, 0.0)


def region_side(map_side: int, target: int) -> int:
    """Return the odd multiple of `map_side` that is closest to `target` pixels.

    An odd multiple has pixels at the centers of the map's positions, so that a slot of a single position has a region.
    """
    return map_side * max(1, 2 * round((target / map_side - 1) / 2) + 1)


def assign_pixels(scores: Tensor, side: int) -> Tensor:
    """Return the prototype with the highest bilinearly interpolated score at each pixel.

    Interpolated scores lie between the smallest and the largest of the four positions around them. Prototypes whose
    largest score is everywhere below another one's smallest are skipped, which leaves few of them to interpolate.

    Args:
        scores: (K, h, w) of one image.
        side: side of the result in pixels.

    Returns:
        (side, side) int64.
    """
    padded = F.pad(scores[None], (1, 1, 1, 1), mode="replicate")[0]
    largest, smallest = F.max_pool2d(padded, 2, 1), -F.max_pool2d(-padded, 2, 1)
    rounding = 1e-5
    candidates = (largest >= smallest.amax(dim=0) - rounding).flatten(1).any(dim=1).nonzero().flatten()
    upsampled = F.interpolate(scores[None, candidates], (side, side), mode="bilinear", align_corners=False)[0]
    return candidates[upsampled.argmax(dim=0)]


def downsample(images: Tensor, side: int) -> Tensor:
    """Resample images (B, 3, S, S) uint8 to (B, 3, side, side) in 0..1."""
    levels = images.float() / 255
    return F.interpolate(levels, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def highlight_region(image: Tensor, region: Tensor, alpha: float) -> Tensor:
    """Draw an image with one region in color and outlined, the rest gray and darkened.

    Args:
        image: (3, side, side) in 0..1.
        region: (side, side) bool.
        alpha: how much the rest is darkened, from 0 (not at all) to 1 (black).

    Returns:
        (side, side, 3) uint8.
    """
    rest = (1 - alpha) * image.mean(dim=0, keepdim=True).expand_as(image)
    highlighted = torch.where(region, image, rest)
    outline = region_outline(region, max(1, round(region.shape[0] / 150)))
    return to_uint8(torch.where(outline, torch.tensor(_OUTLINE_COLOR)[:, None, None], highlighted))


def to_uint8(image: Tensor) -> Tensor:
    """Convert an image (3, H, W) in 0..1 to (H, W, 3) uint8."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0)


def region_outline(region: Tensor, width: int) -> Tensor:
    """Return the outermost `width` pixels of a region (H, W) bool, except along the border of the image."""
    outside = F.pad((~region).float()[None, None], [width] * 4)
    return region & (F.max_pool2d(outside, 2 * width + 1, 1)[0, 0] > 0)


def region_boundaries(assignment: Tensor, width: int) -> Tensor:
    """Return a mask of lines, `width` pixels wide, between the regions of an assignment (H, W) int64."""
    lines = torch.zeros_like(assignment, dtype=torch.bool)
    lines[width:] |= assignment[width:] != assignment[:-width]
    lines[:, width:] |= assignment[:, width:] != assignment[:, :-width]
    return lines


def label_position(region: Tensor) -> tuple[int, int]:
    """Return the row and column of the pixel of a region (H, W) bool that is farthest from its outside."""
    distance = distance_transform_edt(np.pad(region.numpy(), 1))[1:-1, 1:-1]
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return int(row), int(column)
