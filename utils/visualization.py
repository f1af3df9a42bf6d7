"""Images for inspection: augmented views, and slot maps in which each prototype has its own color."""

from collections.abc import Collection
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from utils.batch import MEAN, STD
from utils.files import write_output

_MEAN, _STD = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
# Björn Ottosson, "A perceptual color space for image processing", 2020.
_SRGB_TO_CONES = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=torch.float64,
)
_CONES_TO_OKLAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=torch.float64,
)
_LIGHTNESS, _CHROMA = (480, 840), (120, 220)
"""Ranges of the palette in thousandths of Oklab: no color is close to black, white or gray."""
_MAX_COLORS = 2048
_OPACITY = 0.7
"""Opacity of the colors of a slot map over the photograph."""


def palette(count: int) -> Tensor:
    """Return distinct colors (count, 3) in [0, 1]; the color of a number does not depend on `count`.

    Colors repeat after 2048 numbers.
    """
    colors = _distinct_colors(min(1 << max(count - 1, 0).bit_length(), _MAX_COLORS))
    return colors[torch.arange(count) % len(colors)]


@cache
def _distinct_colors(count: int) -> Tensor:
    """Choose `count` colors, each as far as possible from those before it.

    Coordinates and squared distances are whole numbers, so that rounding cannot change the choice.
    """
    steps = torch.linspace(0, 1, 28, dtype=torch.float64)
    candidates = torch.cartesian_prod(steps, steps, steps)
    points = (1000 * srgb_to_oklab(candidates)).round().float()
    lightness, squared_chroma = points[:, 0], (points[:, 1:] ** 2).sum(dim=1)
    inside = (lightness >= _LIGHTNESS[0]) & (lightness <= _LIGHTNESS[1])
    inside &= (squared_chroma >= _CHROMA[0] ** 2) & (squared_chroma <= _CHROMA[1] ** 2)
    candidates, points = candidates[inside].float(), points[inside]
    chosen = [0]
    distances = ((points - points[0]) ** 2).sum(dim=1)
    while len(chosen) < count:
        chosen.append(int(distances.argmax()))
        distances = distances.minimum(((points - points[chosen[-1]]) ** 2).sum(dim=1))
    return candidates[chosen]


def srgb_to_oklab(colors: Tensor) -> Tensor:
    """Convert sRGB colors (..., 3) in [0, 1] to Oklab, in which distances are close to perceived differences.

    Returns:
        (..., 3): lightness in [0, 1], green to red, blue to yellow.
    """
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    cones = (linear @ _SRGB_TO_CONES.T.to(colors)) ** (1 / 3)
    return cones @ _CONES_TO_OKLAB.T.to(colors)


def normalize(images: Tensor) -> Tensor:
    """Normalize pixel values (N, 3, H, W) in [0, 1] by the ImageNet mean and standard deviation."""
    return (images - _MEAN) / _STD


def denormalize(view: Tensor) -> Tensor:
    """Convert a normalized view (N, 3, H, W) back to pixel values in [0, 1]."""
    return (view * _STD + _MEAN).clamp(0, 1)


def save_png(flag: str, path: Path, image: Tensor) -> None:
    """Write an image (3, H, W) uint8 as a PNG file, atomically.

    Args:
        flag: the flag that names the file or its folder, which begins the message.

    Raises:
        UsageError: the file cannot be written.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_output(flag, path, lambda file: picture.save(file, format="png"))


def view_grid(views: list[Tensor]) -> Tensor:
    """Draw V views, a row each: V tensors (N, 3, S_v, S_v) in [0, 1] -> (3, H, W) uint8."""
    side = views[0].shape[2]
    rows = torch.cat([F.interpolate(view, side) for view in views])
    return to_uint8(make_grid(rows, nrow=len(views[0]), padding=4, pad_value=1))


def slot_grid(images: Tensor, scores: Tensor) -> Tensor:
    """Draw images above their slot maps, a column each.

    Args:
        images: (N, 3, S, S) in [0, 1].
        scores: (N, K, h, w); each pixel gets the color of the prototype with the highest score.

    Returns:
        (3, H, W) uint8.
    """
    side = images.shape[2]
    # At half the resolution: with thousands of prototypes, all of them at each pixel take seconds and gigabytes.
    assignments = torch.stack([assign_pixels(image_scores, side // 2) for image_scores in scores])
    assignments = F.interpolate(assignments[:, None].float(), side)[:, 0].long()
    maps = [render_slot_map(image, assignment) for image, assignment in zip(images, assignments)]
    return to_uint8(make_grid(torch.cat([images, torch.stack(maps)]), nrow=len(images), padding=4, pad_value=1))


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


def render_slot_map(image: Tensor, assignment: Tensor, shown: Collection[int] | None = None) -> Tensor:
    """Draw the colors of the prototypes over the gray photograph, with boundaries of a light and a dark line.

    The photograph is brought to a common brightness and contrast, so that a color looks alike on all of them.

    Args:
        image: (3, H, W) in [0, 1].
        assignment: (H, W) int64, the prototype of each pixel.
        shown: color only these prototypes, and draw the rest gray; None for all.

    Returns:
        (3, H, W) in [0, 1].
    """
    gray = image.mean(dim=0)
    gray = (0.5 + 0.25 * (gray - gray.mean()) / gray.std().clamp(min=0.1)).clamp(0, 1)
    colors = palette(int(assignment.max()) + 1)[assignment].permute(2, 0, 1)
    colored = _OPACITY * colors + (1 - _OPACITY) * gray
    if shown is not None:
        is_shown = torch.isin(assignment, torch.tensor(list(shown)))
        colored = torch.where(is_shown, colored, 0.3 + 0.4 * gray)
    light, dark = region_boundaries(assignment, max(1, round(assignment.shape[0] / 250)))
    return colored.masked_fill(dark, 0.0).masked_fill(light, 1.0)


def region_boundaries(assignment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return masks of two lines, each `width` pixels wide, on either side of the boundaries of regions.

    Args:
        assignment: (H, W) int64.
        width: in pixels.

    Returns:
        (H, W) bool each: the pixels to the right of a boundary or below it, and those to the left or above.
    """
    after, before = torch.zeros(2, *assignment.shape, dtype=torch.bool)
    for dim in (0, 1):
        length = assignment.shape[dim] - width
        differs = assignment.narrow(dim, width, length) != assignment.narrow(dim, 0, length)
        after.narrow(dim, width, length).logical_or_(differs)
        before.narrow(dim, 0, length).logical_or_(differs)
    return after, before & ~after


def to_uint8(image: Tensor) -> Tensor:
    """Convert pixel values in [0, 1] to uint8."""
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
