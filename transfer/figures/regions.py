"""Regions of slots, as pixels of a picture."""

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE = (1.0, 0.78, 0.0)
"""The line around a region."""


def fine_side(cells: int, about: int) -> int:
    """The odd multiple of `cells` that is closest to `about` pixels.

    An odd multiple has pixels on the cells' centers, so that a slot that wins a single cell has a region.
    """
    return cells * max(1, 2 * round((about / cells - 1) / 2) + 1)


def winners(scores: Tensor, side: int) -> Tensor:
    """The prototype that wins at each pixel, of scores that are interpolated first: (K, h, w) -> (side, side) int64.

    Between four cells an interpolated score is at most the largest of the four, and the winner's at least the
    smallest; a prototype that nowhere reaches the best such smallest score is left out, which spares most of them.
    """
    around = F.pad(scores[None], (1, 1, 1, 1), mode="replicate")[0]
    largest, smallest = F.max_pool2d(around, 2, 1), -F.max_pool2d(-around, 2, 1)
    rounding = 1e-5
    candidates = (largest >= smallest.amax(dim=0) - rounding).flatten(1).any(dim=1).nonzero().flatten()
    fine = F.interpolate(scores[None, candidates], (side, side), mode="bilinear", align_corners=False)[0]
    return candidates[fine.argmax(dim=0)]


def shrink(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) uint8 -> (B, 3, side, side) in 0..1."""
    levels = images.float() / 255
    return F.interpolate(levels, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def light_up(picture: Tensor, region: Tensor, alpha: float) -> Tensor:
    """A picture whose region keeps its colors, outlined, while the rest turns gray and fades.

    Args:
        picture: (3, side, side) in 0..1.
        region: (side, side) bool.
        alpha: how much of the rest is taken away.

    Returns:
        (side, side, 3) uint8.
    """
    rest = (1 - alpha) * picture.mean(dim=0, keepdim=True).expand_as(picture)
    lit = torch.where(region, picture, rest)
    lit = torch.where(border(region, max(1, round(region.shape[0] / 150))), torch.tensor(EDGE)[:, None, None], lit)
    return (lit * 255).round().to(torch.uint8).permute(1, 2, 0)


def border(region: Tensor, width: int) -> Tensor:
    """The outermost `width` pixels of a region (H, W) bool where it meets others, not along the picture's rim."""
    outside = F.pad((~region).float()[None, None], [width] * 4)
    return region & (F.max_pool2d(outside, 2 * width + 1, 1)[0, 0] > 0)


def seams(won: Tensor, width: int) -> Tensor:
    """Lines `width` pixels wide where the slots of a map (H, W) meet, bool."""
    lines = torch.zeros_like(won, dtype=torch.bool)
    lines[width:] |= won[width:] != won[:-width]
    lines[:, width:] |= won[:, width:] != won[:, :-width]
    return lines


def middle(region: Tensor) -> tuple[int, int]:
    """The row and column of a pixel well inside a region (H, W) bool: where most of it is around, near and far."""
    shape = region.float()[None]
    around = torch.zeros_like(shape)
    for share in (32, 16, 8, 4):
        reach = max(1, region.shape[0] // share)
        around += F.avg_pool2d(shape, 2 * reach + 1, 1, reach)
    row, column = divmod(int((around[0] * region).argmax()), region.shape[1])
    return row, column
