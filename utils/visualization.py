"""Pictures of a run: augmented views, and what the slots make of them."""

import colorsys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from utils.batch import MEAN, STD

_MEAN, _STD = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]


def palette(count: int) -> Tensor:
    """`count` well separated colors, (count, 3) in 0..1: hues by the golden ratio, three lightnesses in turn."""
    colors = [
        colorsys.hls_to_rgb(number * 0.618034 % 1, (0.55, 0.42, 0.7)[number % 3], 0.75) for number in range(count)
    ]
    return torch.tensor(colors)


def normalize(images: Tensor) -> Tensor:
    """Levels (N, 3, H, W) in 0..1 as the networks want them."""
    return (images - _MEAN) / _STD


def levels(view: Tensor) -> Tensor:
    """A normalized view (N, 3, H, W) as levels in 0..1."""
    return (view * _STD + _MEAN).clamp(0, 1)


def save(picture: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 as PNG, to a temporary name first."""
    temporary = path.with_name(f".{path.name}")
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(temporary, format="png")
    temporary.replace(path)


def view_grid(views: list[Tensor]) -> Tensor:
    """Views side by side, a row each: V tensors (N, 3, S_v, S_v) in 0..1 -> (3, H, W) uint8."""
    side = views[0].shape[2]
    rows = torch.cat([F.interpolate(view, side) for view in views])
    return _to_bytes(make_grid(rows, nrow=len(views[0]), padding=4, pad_value=1))


def slot_grid(images: Tensor, scores: Tensor, opacity: float = 0.7) -> Tensor:
    """Images over their slot maps, a column each.

    Args:
        images: (N, 3, S, S) in 0..1.
        scores: (N, K, h, w); each pixel gets the color of the prototype that wins there.
        opacity: of the colors over the gray image.

    Returns:
        (3, H, W) uint8.
    """
    side = images.shape[2]
    winners = torch.stack([_upsample(one, side // 2).argmax(dim=0) for one in scores])
    colors = F.interpolate(palette(scores.shape[1])[winners].permute(0, 3, 1, 2), side)
    gray = images.mean(dim=1, keepdim=True)
    maps = opacity * colors + (1 - opacity) * gray
    return _to_bytes(make_grid(torch.cat([images, maps]), nrow=len(images), padding=4, pad_value=1))


def _upsample(scores: Tensor, side: int) -> Tensor:
    """Scores (K, h, w) of one image -> (K, side, side); of all images at once they would fill the memory."""
    return F.interpolate(scores[None], side, mode="bilinear", align_corners=False)[0]


def _to_bytes(picture: Tensor) -> Tensor:
    return (picture * 255).round().clamp(0, 255).to(torch.uint8)
