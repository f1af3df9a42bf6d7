"""Square images of one size, side by side: photographs, colors and weights of patches, and marked patches."""

from functools import cache

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer.figures.layout import MARK_COLOR
from utils.visualization import to_uint8


def tile_side(map_side: int, target: int) -> int:
    """Return the multiple of `map_side` that is closest to `target` pixels, so that patches have whole pixels."""
    return map_side * max(1, round(target / map_side))


def to_pixels(image: Tensor) -> Tensor:
    """Return an image (3, H, W) in [0, 1] as pixels (H, W, 3) uint8."""
    return to_uint8(image).permute(1, 2, 0)


def enlarge(maps: Tensor, side: int) -> Tensor:
    """Enlarge maps (..., h, h) to (..., side, side): each patch becomes a square of one color."""
    factor = side // maps.shape[-1]
    return maps.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def weight_colors(weights: Tensor) -> Tensor:
    """Return colors (N, 3, h, w) in [0, 1] of weights (N, h, w), in each map from its smallest to its largest."""
    smallest, largest = weights.amin(dim=(1, 2), keepdim=True), weights.amax(dim=(1, 2), keepdim=True)
    scaled = (weights - smallest) / (largest - smallest).clamp(min=1e-30)
    return _heat_colors()[(255 * scaled).round().long()].permute(0, 3, 1, 2)


@cache
def _heat_colors() -> Tensor:
    """Return 256 colors (256, 3) from black over red to pale yellow."""
    return torch.from_numpy(matplotlib.colormaps["inferno"](range(256))[:, :3]).float()


def mark_patch(image: Tensor, position: int, map_side: int) -> Tensor:
    """Draw a box around a patch: a line in color between two black ones.

    Args:
        image: (3, side, side) in [0, 1].
        position: of the patch, in row-major order.
        map_side: patches in a row.
    """
    side = image.shape[1]
    cell, width = side // map_side, max(1, round(side / 100))
    patch = torch.zeros(1, 1, side, side)
    row, column = divmod(position, map_side)
    patch[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 1
    colors = ((0.0, 0.0, 0.0), MARK_COLOR, (0.0, 0.0, 0.0))
    widths = (1, width, 1)
    inner = patch[0, 0] > 0
    for color, line in zip(colors, widths):
        outer = F.max_pool2d(inner.float()[None, None], 2 * line + 1, 1, line)[0, 0] > 0
        image = torch.where(outer & ~inner, torch.tensor(color)[:, None, None], image)
        inner = outer
    return image
