"""Two views' geometry -> the same pixels (SlotCon's inverse augmentation)."""

import torch
from torch import Tensor
from torchvision.ops import roi_align

from utils.batch import Batch


def overlap(batch: Batch, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Where view a shows what view b shows as well.

    Returns:
        boxes: (B, 4) float32, x0 y0 x1 y1 in view a's own frame, flipped and turned as it is, 0..1.
            A view that shares nothing with the other has its whole frame for a box.
        meets: (B,) bool, whether the two views intersect.
    """
    crop_a, crop_b = batch.crops[:, a], batch.crops[:, b]
    low = torch.maximum(crop_a[:, :2], crop_b[:, :2])
    high = torch.minimum(crop_a[:, 2:], crop_b[:, 2:])
    meets = (high > low).all(dim=1)
    size = crop_a[:, 2:] - crop_a[:, :2]
    box = torch.cat([(low - crop_a[:, :2]) / size, (high - crop_a[:, :2]) / size], dim=1)
    whole = torch.zeros_like(box)
    whole[:, 2:] = 1
    box = torch.where(meets[:, None], box, whole)
    x0, y0, x1, y1 = box.unbind(1)
    mirrored = torch.stack([1 - x1, y0, 1 - x0, y1], dim=1)
    box = torch.where(batch.flips[:, a, None], mirrored, box)
    return _turn_boxes(box, batch.turns[:, a]), meets


def align(maps: Tensor, boxes: Tensor, flips: Tensor, turns: Tensor | None = None) -> Tensor:
    """A view's maps on the pixels of `boxes`, as the unflipped, unturned image shows them.

    RoIAlign (aligned, adaptive sampling) of the box to the full grid, then the turns and the flip are undone.

    Args:
        maps: (B, C, H, W), any float type; square where views are turned.
        boxes: (B, 4) from `overlap`.
        flips: (B,) bool.
        turns: (B,) int64, counter-clockwise quarter turns; None where the method's views are never turned.

    Returns:
        (B, C, H, W) float32.
    """
    height, width = maps.shape[2:]
    number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    cells = torch.cat([number[:, None], _scale(boxes, width, height)], dim=1)
    with torch.autocast(maps.device.type, enabled=False):
        aligned = roi_align(maps.float(), cells, (height, width), aligned=True)
    if turns is not None:
        aligned = _unturn(aligned, turns)
    return torch.where(flips[:, None, None, None], aligned.flip(3), aligned)


def _scale(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes (B, 4) of a unit square in cells; without a constant tensor, whose copy would wait for the device."""
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([x0 * width, y0 * height, x1 * width, y1 * height], dim=1)


def _turn_boxes(boxes: Tensor, turns: Tensor) -> Tensor:
    """Boxes (B, 4) in a unit square, after counter-clockwise quarter turns (B,) of the square."""
    x0, y0, x1, y1 = boxes.unbind(1)
    once = torch.stack([y0, 1 - x1, y1, 1 - x0], dim=1)
    twice = torch.stack([1 - x1, 1 - y1, 1 - x0, 1 - y0], dim=1)
    thrice = torch.stack([1 - y1, x0, 1 - y0, x1], dim=1)
    quarters = turns.remainder(4)[:, None, None].expand(-1, 1, 4)
    return torch.stack([boxes, once, twice, thrice], dim=1).gather(1, quarters).squeeze(1)


def _unturn(maps: Tensor, turns: Tensor) -> Tensor:
    """Square maps (B, C, S, S), each turned back (clockwise) by its own number of quarter turns (B,)."""
    upright = maps
    for quarters in (1, 2, 3):
        turned = (turns.remainder(4) == quarters)[:, None, None, None]
        upright = torch.where(turned, maps.rot90(-quarters, (2, 3)), upright)
    return upright
