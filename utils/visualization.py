"""Images for inspection: augmented views, and slot maps."""

import colorsys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from utils.batch import MEAN, STD
from utils.files import atomic_write

_MEAN, _STD = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
_OPACITY = 0.7
"""Opacity of the colors of a slot map over the gray image."""


def palette(count: int) -> Tensor:
    """Return distinct colors (count, 3) in 0..1: hues by the golden ratio, alternating three lightnesses."""
    colors = [
        colorsys.hls_to_rgb(number * 0.618034 % 1, (0.55, 0.42, 0.7)[number % 3], 0.75) for number in range(count)
    ]
    return torch.tensor(colors)


def normalize(images: Tensor) -> Tensor:
    """Normalize levels (N, 3, H, W) in 0..1 by the ImageNet mean and standard deviation."""
    return (images - _MEAN) / _STD


def denormalize(view: Tensor) -> Tensor:
    """Convert a normalized view (N, 3, H, W) back to levels in 0..1."""
    return (view * _STD + _MEAN).clamp(0, 1)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W) uint8 as a PNG file, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    atomic_write(path, lambda file: picture.save(file, format="png"))


def view_grid(views: list[Tensor]) -> Tensor:
    """Draw V views, a row each: V tensors (N, 3, S_v, S_v) in 0..1 -> (3, H, W) uint8."""
    side = views[0].shape[2]
    rows = torch.cat([F.interpolate(view, side) for view in views])
    return _to_uint8(make_grid(rows, nrow=len(views[0]), padding=4, pad_value=1))


def slot_grid(images: Tensor, scores: Tensor) -> Tensor:
    """Draw images above their slot maps, a column each.

    Args:
        images: (N, 3, S, S) in 0..1.
        scores: (N, K, h, w); each pixel gets the color of the prototype with the highest score.

    Returns:
        (3, H, W) uint8.
    """
    side = images.shape[2]
    assignment = torch.stack([_upsample(score, side // 2).argmax(dim=0) for score in scores])
    colors = F.interpolate(palette(scores.shape[1])[assignment].permute(0, 3, 1, 2), side)
    gray = images.mean(dim=1, keepdim=True)
    maps = _OPACITY * colors + (1 - _OPACITY) * gray
    return _to_uint8(make_grid(torch.cat([images, maps]), nrow=len(images), padding=4, pad_value=1))


def _upsample(scores: Tensor, side: int) -> Tensor:
    """Upsample the scores (K, h, w) of one image to (K, side, side); all images at once would need much memory."""
    return F.interpolate(scores[None], side, mode="bilinear", align_corners=False)[0]


def _to_uint8(image: Tensor) -> Tensor:
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
