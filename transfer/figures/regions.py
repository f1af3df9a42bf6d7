"""The regions of slots in an image, as masks of pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt, label
from torch import Tensor

from transfer.figures.layout import MARK_COLOR
from transfer.figures.tiles import to_pixels


def region_side(map_side: int, target: int) -> int:
    """Return the odd multiple of `map_side` that is closest to `target` pixels.

    An odd multiple has pixels at the centers of the map's positions, so that a slot of a single position has a region.
    """
    return map_side * max(1, 2 * round((target / map_side - 1) / 2) + 1)


def resample(images: Tensor, side: int) -> Tensor:
    """Resample images (B, 3, S, S) uint8 to (B, 3, side, side) in 0..1."""
    values = images.float() / 255
    return F.interpolate(values, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


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
    return to_pixels(torch.where(outline, torch.tensor(MARK_COLOR)[:, None, None], highlighted))


def region_outline(region: Tensor, width: int) -> Tensor:
    """Return the outermost `width` pixels of a region (H, W) bool, except along the border of the image."""
    outside = F.pad((~region).float()[None, None], [width] * 4)
    return region & (F.max_pool2d(outside, 2 * width + 1, 1)[0, 0] > 0)


def connected_regions(assignment: Tensor, min_pixels: float) -> list[tuple[int, np.ndarray]]:
    """Return the connected regions of at least `min_pixels` pixels of an assignment (H, W) int64, the largest first.

    Returns:
        Pairs of prototype and region (H, W) bool. Pixels are connected with their four neighbors.
    """
    regions = []
    for prototype in assignment.unique().tolist():
        components, _ = label((assignment == prototype).numpy())
        sizes = np.bincount(components.flat)
        regions += [
            (sizes[number], prototype, components == number)
            for number in range(1, len(sizes))
            if sizes[number] >= min_pixels
        ]
    regions.sort(key=lambda region: -region[0])
    return [(prototype, region) for _, prototype, region in regions]


def pixels_by_depth(region: np.ndarray) -> np.ndarray:
    """Return the pixels of a region (H, W) bool as x, y (N, 2), those farthest from its outside first."""
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    rows, columns = region.nonzero()
    order = np.argsort(-depth[rows, columns], kind="stable")
    return np.stack([columns, rows], axis=1)[order]
