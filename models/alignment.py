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
    crops, flips, rotations = batch.crops, batch.flips, batch.rotations
    return _intersection_boxes(crops[:, a], crops[:, b], flips[:, a], rotations[:, a])


def pairwise_overlap_boxes(batch: Batch) -> tuple[Tensor, Tensor]:
    """Locate the intersections of all pairs of views.

    Returns:
        boxes: (B, V, V, 4), of which `[:, a, b]` is the result of `overlap_boxes` for views a and b.
        intersects: (B, V, V) bool.
    """
    crops, flips, rotations = batch.crops, batch.flips, batch.rotations
    return _intersection_boxes(crops[:, :, None], crops[:, None], flips[:, :, None], rotations[:, :, None])


def _intersection_boxes(crop_a: Tensor, crop_b: Tensor, flip: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Locate the intersections of crops (..., 4) in the first one, whose flip and rotation are given."""
    low = torch.maximum(crop_a[..., :2], crop_b[..., :2])
    high = torch.minimum(crop_a[..., 2:], crop_b[..., 2:])
    intersects = (high > low).all(dim=-1)
    size = crop_a[..., 2:] - crop_a[..., :2]
    box = torch.cat([(low - crop_a[..., :2]) / size, (high - crop_a[..., :2]) / size], dim=-1)
    whole = torch.zeros_like(box)
    whole[..., 2:] = 1
    box = torch.where(intersects[..., None], box, whole)
    x0, y0, x1, y1 = box.unbind(-1)
    mirrored = torch.stack([1 - x1, y0, 1 - x0, y1], dim=-1)
    box = torch.where(flip[..., None], mirrored, box)
    return _rotate_boxes(box, rotation), intersects


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
        boxes: (B, 4) from `overlap_boxes`, or (B, P, 4), P boxes for each map.
        flips: (B,) bool.
        rotations: (B,) int64, counter-clockwise quarter turns; None for methods that never rotate views.
        output_size: rows and columns of the result, by default those of the maps; square where views are rotated.

    Returns:
        (B, C, *output_size), or (B, P, C, *output_size), float32, or float64 for maps of float64.
    """
    height, width = maps.shape[2:]
    out_height, out_width = output_size or (height, width)
    maps = upcast(maps)
    x0, y0, x1, y1 = boxes.to(maps.dtype).unbind(-1)
    rows, columns = _sampling_matrix(y0, y1, height, out_height), _sampling_matrix(x0, x1, width, out_width)
    if rotations is None:
        columns = torch.where(_per_map(flips, columns), columns.flip(-2), columns)
    with torch.autocast(maps.device.type, enabled=False):
        if boxes.ndim == 2:
            aligned = torch.einsum("biy,bcyx,bjx->bcij", rows, maps, columns)
        else:
            aligned = torch.einsum("bpiy,bcyx,bpjx->bpcij", rows, maps, columns)
    if rotations is None:
        return aligned
    aligned = _undo_rotation(aligned, rotations)
    return torch.where(_per_map(flips, aligned), aligned.flip(-1), aligned)


def _per_map(values: Tensor, maps: Tensor) -> Tensor:
    """Reshape values (B,) so that they broadcast to maps (B, ...)."""
    return values.view(-1, *(1,) * (maps.ndim - 1))


def _sampling_matrix(start: Tensor, end: Tensor, cells: int, outputs: int) -> Tensor:
    """Return the interpolation matrices (..., outputs, cells) of RoIAlign along one axis.

    They hold the weight of each cell in each output, for boxes from `start` to `end` (...), in 0..1.
    """
    number = torch.arange(cells, device=start.device, dtype=start.dtype)
    output = torch.arange(outputs, device=start.device, dtype=start.dtype)
    step = ((end - start) * (cells / outputs))[..., None]
    first = start[..., None] * cells - 0.5
    max_samples = math.ceil(cells / outputs)
    if max_samples == 1:
        return _bilinear_weights(first + (output + 0.5) * step, number)
    # The tolerance keeps rounding of a whole number of samples from adding one.
    samples = (step - 1e-5).ceil().clamp(min=1)
    weights = []
    for sample in range(max_samples):
        positions = first + (output + (sample + 0.5) / samples) * step
        used = (sample < samples) / samples
        weights.append(_bilinear_weights(positions, number) * used[..., None])
    return torch.stack(weights).sum(dim=0)


def _bilinear_weights(positions: Tensor, number: Tensor) -> Tensor:
    """Return the weights (..., outputs, cells) of cells `number` at positions (..., outputs), clamped to the map."""
    inside = positions.clamp(0, len(number) - 1)
    return (1 - (inside[..., None] - number).abs()).clamp(min=0)


def _rotate_boxes(boxes: Tensor, rotations: Tensor) -> Tensor:
    """Rotate boxes (..., 4) in a unit square by counter-clockwise quarter turns of the square, broadcast to (...)."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    rotated_90 = torch.stack([y0, 1 - x1, y1, 1 - x0], dim=-1)
    rotated_180 = torch.stack([1 - x1, 1 - y1, 1 - x0, 1 - y0], dim=-1)
    rotated_270 = torch.stack([1 - y1, x0, 1 - y0, x1], dim=-1)
    quarters = rotations.remainder(4).expand(boxes.shape[:-1])[..., None, None].expand(*boxes.shape[:-1], 1, 4)
    return torch.stack([boxes, rotated_90, rotated_180, rotated_270], dim=-2).gather(-2, quarters).squeeze(-2)


def _undo_rotation(maps: Tensor, rotations: Tensor) -> Tensor:
    """Rotate square maps (B, ..., S, S) back (clockwise), each by its own number of quarter turns (B,)."""
    upright = maps
    for quarters in (1, 2, 3):
        rotated = _per_map(rotations.remainder(4) == quarters, maps)
        upright = torch.where(rotated, maps.rot90(-quarters, (-2, -1)), upright)
    return upright
