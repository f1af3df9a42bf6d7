"""Two views' geometry -> the same pixels (SlotCon's inverse augmentation)."""

import torch
from torch import Tensor

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

    RoIAlign (aligned, adaptive sampling) of the box to the full grid, then the turns and the flip are undone. A box
    inside the map has one sample a cell; that is linear in rows and in columns, hence two small matrix products.

    Args:
        maps: (B, C, H, W), any float type; square where views are turned.
        boxes: (B, 4) from `overlap`.
        flips: (B,) bool.
        turns: (B,) int64, counter-clockwise quarter turns; None where the method's views are never turned.

    Returns:
        (B, C, H, W) float32.
    """
    height, width = maps.shape[2:]
    x0, y0, x1, y1 = boxes.unbind(1)
    rows, columns = _samples(y0, y1, height), _samples(x0, x1, width)
    if turns is None:
        columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    with torch.autocast(maps.device.type, enabled=False):
        aligned = torch.einsum("biy,bcyx,bjx->bcij", rows, maps.float(), columns)
    if turns is None:
        return aligned
    aligned = _unturn(aligned, turns)
    return torch.where(flips[:, None, None, None], aligned.flip(3), aligned)


def _samples(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Weights (B, cells, cells) of a row's cells in as many bilinear samples between start and end (B,), 0..1."""
    number = torch.arange(cells, device=start.device, dtype=start.dtype)
    places = start[:, None] * cells - 0.5 + (number + 0.5) * (end - start)[:, None]
    return (1 - (places.clamp(0, cells - 1)[:, :, None] - number).abs()).clamp(min=0)


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
