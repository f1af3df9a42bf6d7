"""Colour on the device: drawn for each image in the worker, applied to a whole batch at once.

The operations are Pillow's, on float levels 0..255 that are clamped after each of them: brightness, contrast,
saturation and hue in the image's own order, then greyscale, Gaussian blur, solarise, in this order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.batch import Batch

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
SOLARISE_FROM = 128

# The columns of a view's colour parameters.
FACTORS = slice(0, 4)
"""Factors of brightness, contrast, saturation (neutral 1); the hue's shift in turns of the circle (neutral 0)."""
ORDER = slice(4, 8)
"""The four jitters, numbered as in FACTORS, in the order in which they are applied."""
GREY, BLUR, SOLARISE = 8, 9, 10
"""Greyscale (0 or 1); sigma of the blur in pixels (0: none); solarise (0 or 1)."""
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ColourRecipe:
    """How strongly and how often the colours of a view change."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation: factors in 1 ± strength; hue: shifts in ± strength turns."""
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0


def draw_colour(rng: np.random.Generator, recipe: ColourRecipe) -> np.ndarray:
    """Draw the colour parameters of one view: (11,) float32, its columns as named above."""
    colour = np.array(NEUTRAL, dtype=np.float32)
    if rng.random() < recipe.jitter_p:
        strengths = np.array(recipe.jitter)
        neutral = colour[FACTORS]
        lowest = np.where(neutral == 1, np.maximum(0, 1 - strengths), -strengths)
        colour[FACTORS] = rng.uniform(lowest, neutral + strengths)
        colour[ORDER] = rng.permutation(4)
    colour[GREY] = rng.random() < recipe.grey_p
    if rng.random() < recipe.blur_p:
        colour[BLUR] = rng.uniform(*recipe.blur_sigma)
    colour[SOLARISE] = rng.random() < recipe.solarise_p
    return colour


# Every operation takes images (n, 3, H, W), which it may overwrite, and their n parameters (n, 1, 1, 1) or more.


def luma(x: Tensor) -> Tensor:
    """Grey levels (n, 1, H, W), weighted as Pillow weights them."""
    return (x[:, :1] * LUMA[0]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2])


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = luma(x).mean(dim=(2, 3), keepdim=True).round_()
    return x.lerp_(mean, 1 - factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return x.lerp_(luma(x), 1 - factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` circles; saturation and value stay."""
    red, green, blue = x.split(1, dim=1)
    value, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - lowest
    scale = chroma.clamp(min=1e-6).reciprocal_()
    # The hue in sixths of the circle, counted from red.
    sixths = torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4)
    sixths = torch.where(value == red, (green - blue) * scale, sixths).add_(6 * shift).remainder_(6)
    shares = ((sixths - 3).abs_().sub_(1), 2 - (sixths - 2).abs_(), 2 - (sixths - 4).abs_())
    return torch.cat([lowest + chroma * share.clamp_(0, 1) for share in shares], dim=1)


def greyscale(x: Tensor, _: Tensor) -> Tensor:
    return luma(x).round_().expand_as(x)


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """Filter rows, then columns with the taps (n, T, 1, 1) of each image; pixels of the edge are extended."""
    n, channels, height, width = x.shape
    kernels = taps.squeeze(-1).repeat_interleave(channels, dim=0)[:, None]
    radius = taps.shape[1] // 2
    x = F.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(x, kernels[:, :, None, :, 0], groups=n * channels)
    x = F.conv2d(x, kernels[:, :, :, None, 0], groups=n * channels)
    return x.view(n, channels, height, width)


def solarise(x: Tensor, _: Tensor) -> Tensor:
    return torch.where(x >= SOLARISE_FROM, 255 - x, x)
