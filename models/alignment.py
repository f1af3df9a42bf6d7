"""Inverse augmentation (SlotCon, section 3.2): bring the maps of two views onto the same pixels of the image."""

import math

import torch
from torch import Tensor

from models.precision import upcast
from utils.batch import Batch


def overlap_boxes(batch: Batch, a: int, b: int) -> tuple[Tensor, Tensor]:
    """Locate the intersection of views a and b in view a.

    Returns:
        boxes: (B, 4) float32, x0 y0 x1 y1 in view a after its flip and rotation, as fractions of its sides;
            (0, 0, 1, 1) where the views do not intersect.
        intersects: (B,) bool, whether the two views intersect.
    """
    crop_a, crop_b = batch.crops[:, a], batch.crops[:, b]
    low = torch.maximum(crop_a[:, :2], crop_b[:, :2])
    high = torch.minimum(crop_a[:, 2:], crop_b[:, 2:])
    intersects = (high > low).all(dim=1)
    size = crop_a[:, 2:] - crop_a[:, :2]
    box = torch.cat([(low - crop_a[:, :2]) / size, (high - crop_a[:, :2]) / size], dim=1)
    whole = torch.zeros_like(box)
    whole[:, 2:] = 1
    box = torch.where(intersects[:, None], box, whole)
    x0, y0, x1, y1 = box.unbind(1)
    mirrored = torch.stack([1 - x1, y0, 1 - x0, y1], dim=1)
    box = torch.where(batch.flips[:, a, None], mirrored, box)
    return _rotate_boxes(box, batch.rotations[:, a]), intersects


def align(
    maps: Tensor,
    boxes: Tensor,
    flips: Tensor,
    rotations: Tensor | None = None,
    output_size: tuple[int, int] | None = None,
) -> Tensor:
    """Sample the maps of a view inside `boxes`, and undo the rotation and the flip of the view.

    This is RoIAlign with `aligned=True` and adaptive sampling, `ceil(box side / output side)` samples for each cell
    and direction. Bilinear sampling is linear in rows and in columns, hence two small matrix products.

    Args:
        maps: (B, C, H, W), any floating-point type; square where views are rotated.
        boxes: (B, 4) from `overlap_boxes`.
        flips: (B,) bool.
        rotations: (B,) int64, counter-clockwise quarter turns; None for methods that never rotate views.
        output_size: rows and columns of the result, by default those of the maps; square where views are rotated.

    Returns:
        (B, C, *output_size) float32, or float64 for maps of float64.
    """
    height, width = maps.shape[2:]
    out_height, out_width = output_size or (height, width)
    maps = upcast(maps)
    x0, y0, x1, y1 = boxes.to(maps.dtype).unbind(1)
    rows, columns = _sampling_matrix(y0, y1, height, out_height), _sampling_matrix(x0, x1, width, out_width)
    if rotations is None:
        columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    with torch.autocast(maps.device.type, enabled=False):
        aligned = torch.einsum("biy,bcyx,bjx->bcij", rows, maps, columns)
    if rotations is None:
        return aligned
    aligned = _undo_rotation(aligned, rotations)
    return torch.where(flips[:, None, None, None], aligned.flip(3), aligned)


def _sampling_matrix(start: Tensor, end: Tensor, cells: int, outputs: int) -> Tensor:
    """Return the interpolation matrix (B, outputs, cells) of RoIAlign along one axis.

    It holds the weight of each cell in each output, for boxes from `start` to `end` (B,), in 0..1.
    """
    number = torch.arange(cells, device=start.device, dtype=start.dtype)
    output = torch.arange(outputs, device=start.device, dtype=start.dtype)
    step = (end - start) * (cells / outputs)
    max_samples = math.ceil(cells / outputs)
    if max_samples == 1:
        positions = start[:, None] * cells - 0.5 + (output + 0.5) * step[:, None]
        return _bilinear_weights(positions, number)
    # The tolerance keeps rounding of a whole number of samples from adding one.
    samples = (step - 1e-5).ceil().clamp(min=1)[:, None]
    weights = []
    for sample in range(max_samples):
        positions = start[:, None] * cells - 0.5 + (output + (sample + 0.5) / samples) * step[:, None]
        used = (sample < samples) / samples
        weights.append(_bilinear_weights(positions, number) * used[:, :, None])
    return torch.stack(weights).sum(dim=0)


def _bilinear_weights(positions: Tensor, number: Tensor) -> Tensor:
    """Return the weights (B, outputs, cells) of cells `number` at positions (B, outputs), clamped to the map."""
    inside = positions.clamp(0, len(number) - 1)
    return (1 - (inside[:, :, None] - number).abs()).clamp(min=0)


def _rotate_boxes(boxes: Tensor, rotations: Tensor) -> Tensor:
    """Rotate boxes (B, 4) in a unit square by counter-clockwise quarter turns (B,) of the square."""
    x0, y0, x1, y1 = boxes.unbind(1)
    rotated_90 = torch.stack([y0, 1 - x1, y1, 1 - x0], dim=1)
    rotated_180 = torch.stack([1 - x1, 1 - y1, 1 - x0, 1 - y0], dim=1)
    rotated_270 = torch.stack([1 - y1, x0, 1 - y0, x1], dim=1)
    quarters = rotations.remainder(4)[:, None, None].expand(-1, 1, 4)
    return torch.stack([boxes, rotated_90, rotated_180, rotated_270], dim=1).gather(1, quarters).squeeze(1)


def _undo_rotation(maps: Tensor, rotations: Tensor) -> Tensor:
    """Rotate square maps (B, C, S, S) back (clockwise), each by its own number of quarter turns (B,)."""
    upright = maps
    for quarters in (1, 2, 3):
        rotated = (rotations.remainder(4) == quarters)[:, None, None, None]
        upright = torch.where(rotated, maps.rot90(-quarters, (2, 3)), upright)
    return upright
