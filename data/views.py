"""Geometry on the worker: which crops of an image, mirrored or not; cut out and resampled to uint8.

The chance of a view comes from (seed, epoch, index, view) alone, so that any run, at any number of workers,
sees the same views.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.color import ColorRecipe, draw_color

Box = tuple[int, int, int, int]
"""x0 y0 x1 y1 in pixels of the source image, x1 and y1 exclusive."""

TRIES = 10
MIN_OVERLAP = 0.01
"""Share of the second crop's target area that has to lie in the first crop."""


@dataclass(frozen=True)
class ViewRecipe:
    """What one view of an image may look like."""

    size: int
    """Side of the square view in pixels."""
    scale: tuple[float, float]
    """Area of the crop as a share of the image's area."""
    color: ColorRecipe
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, log-uniform."""
    flip_p: float = 0.5


class ViewSet(NamedTuple):
    """V views of one image, as a worker sends them; the facts are those of `utils.batch.Batch`."""

    views: list[Tensor]
    """V tensors (3, S_v, S_v) uint8; none before they are cut."""
    crops: Tensor
    """(V, 4) float32."""
    flips: Tensor
    """(V,) bool."""
    turns: Tensor
    """(V,) int64."""
    color: Tensor
    """(V, P) float32, the columns of `data.color`."""


def slotcon_views(image_size: int, min_scale: float) -> tuple[ViewRecipe, ViewRecipe]:
    """SlotCon's two views, as published: the second is seldom blurred and sometimes solarized."""
    first = ViewRecipe(image_size, (min_scale, 1.0), ColorRecipe(blur_p=1.0))
    return first, replace(first, color=ColorRecipe(blur_p=0.1, solarize_p=0.2))


def make_views(image: Image.Image, recipes: Sequence[ViewRecipe], seed: int, epoch: int, index: int) -> ViewSet:
    """Draw and cut the views of image number `index`."""
    drawn = draw_views(image.size, recipes, seed, epoch, index)
    pixels, boxes = rgb_pixels(image), drawn.crops.int().tolist()
    views = [cut(pixels, box, recipe.size, flip) for box, recipe, flip in zip(boxes, recipes, drawn.flips.tolist())]
    return drawn._replace(views=views)


def draw_views(
    image_size: tuple[int, int], recipes: Sequence[ViewRecipe], seed: int, epoch: int, index: int
) -> ViewSet:
    """Draw the views of image number `index`, of (width, height), without cutting them; every crop after the first
    is drawn to meet the first."""
    boxes: list[Box] = []
    flips, color = [], []
    for number, recipe in enumerate(recipes):
        rng = np.random.default_rng([seed, epoch, index, number])
        boxes.append(draw_crop(rng, image_size, recipe, meet=boxes[0] if boxes else None))
        flips.append(bool(rng.random() < recipe.flip_p))
        color.append(draw_color(rng, recipe.color))
    return ViewSet(
        [],
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(flips),
        torch.zeros(len(boxes), dtype=torch.int64),
        torch.from_numpy(np.stack(color)),
    )


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """An image of any mode as (H, W, 3) uint8; 16-bit levels keep their upper half, which Pillow would clip."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def center_view(image: Image.Image, size: int) -> Tensor:
    """The largest square in the middle of an image, resampled: (3, size, size) uint8."""
    pixels = rgb_pixels(image)
    return cut(pixels, central_crop(image.size, (1, 1)), size, flip=False)


def draw_crop(
    rng: np.random.Generator, image_size: tuple[int, int], recipe: ViewRecipe, meet: Box | None = None
) -> Box:
    """A random crop of an image (width, height): ten tries to also meet another crop, then ten tries without
    that condition, then the largest central crop of an allowed aspect."""
    if meet is not None:
        for _ in range(TRIES):
            box, area = try_crop(rng, image_size, recipe)
            if box is not None and overlap(box, meet) >= MIN_OVERLAP * area:
                return box
    for _ in range(TRIES):
        box, _area = try_crop(rng, image_size, recipe)
        if box is not None:
            return box
    return central_crop(image_size, recipe.ratio)


def try_crop(rng: np.random.Generator, image_size: tuple[int, int], recipe: ViewRecipe) -> tuple[Box | None, float]:
    """Draw area, aspect and position; the box is None if it does not fit. The area is the one aimed at."""
    width, height = image_size
    area = width * height * rng.uniform(*recipe.scale)
    ratio = math.exp(rng.uniform(math.log(recipe.ratio[0]), math.log(recipe.ratio[1])))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if not (0 < w <= width and 0 < h <= height):
        return None, area
    x, y = (int(rng.integers(room, endpoint=True)) for room in (width - w, height - h))
    return (x, y, x + w, y + h), area


def central_crop(image_size: tuple[int, int], ratio: tuple[float, float]) -> Box:
    """The largest crop in the middle of an image (width, height) whose aspect lies within `ratio`."""
    width, height = image_size
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def overlap(a: Box, b: Box) -> int:
    """Area of the intersection in pixels."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, w) * max(0, h)


def cut(pixels: np.ndarray, box: Box, size: int, flip: bool) -> Tensor:
    """Crop pixels (H, W, 3) uint8, resample to a square, mirror if asked: (3, size, size) uint8.

    The filter is Pillow's antialiased bicubic, rows first, at a fifth of its time: 99.7 % of all values are
    equal, the others differ by one level, very few by two. (Pillow 13 takes the cheaper direction first, and then
    differs from both by several levels where the first pass clips.)
    """
    x0, y0, x1, y1 = box
    crop = torch.from_numpy(pixels[y0:y1, x0:x1].copy())[None].permute(0, 3, 1, 2)
    view = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0].contiguous()
    return view.flip(2) if flip else view
