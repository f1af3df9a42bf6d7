"""Color augmentation: parameters drawn for each view in the worker, applied to a whole batch on the device.

The operations are those of Pillow, on float levels 0..255 that are clamped after each of them: brightness, contrast,
saturation and hue in an order drawn for each image, then grayscale, Gaussian blur and solarization.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.batch import MEAN, STD, Batch
from utils.device import to_device
from utils.view_recipes import ColorRecipe

# Why not a library: the two views of an image, 224 px, take 25 ms of one CPU core with kornia 0.9 (batches of 64;
# 7.7 ms in chunks of 4), 6.9 ms with the v2 transforms of torchvision, 2.9 ms here. kornia draws one order of the
# jitter operations for a whole batch, torchvision one set of parameters for all images of a call; both blur by a
# Gaussian window of fixed size, Pillow by box filters of fractional length.

LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""Weights of red, green and blue in a gray level, as in Pillow."""

# The columns of the color parameters of a view.
FACTORS = slice(0, 4)
"""Factors of brightness, contrast and saturation; shift of the hue as a fraction of the color circle."""
ORDER = slice(4, 8)
"""The four jitter operations, numbered as in FACTORS, in the order of their application."""
GRAY, BLUR, SOLARIZE = 8, 9, 10
"""Grayscale (0 or 1); sigma of the blur in pixels (0: none); solarization (0 or 1)."""
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0)
"""The parameters of a view whose color does not change."""

CPU_CHUNK = 4
"""Images processed at a time on the CPU, so that they stay in its cache from one operation to the next."""
BAND_ROWS = 32
"""Rows of a banded matrix that are multiplied at a time."""


def draw_color(rng: np.random.Generator, recipe: ColorRecipe) -> np.ndarray:
    """Draw the color parameters of one view: (11,) float32, its columns as named above."""
    color = np.array(NEUTRAL, dtype=np.float32)
    if rng.random() < recipe.jitter_p:
        *strengths, hue_strength = recipe.jitter
        factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
        color[FACTORS] = [*factors, rng.uniform(-hue_strength, hue_strength)]
        color[ORDER] = rng.permutation(4)
    color[GRAY] = rng.random() < recipe.gray_p
    if rng.random() < recipe.blur_p:
        color[BLUR] = rng.uniform(*recipe.blur_sigma)
    color[SOLARIZE] = rng.random() < recipe.solarize_p
    return color


def apply_color(batch: Batch) -> Batch:
    """Color and normalize the views of a batch on their device; `color` of the returned batch is None."""
    if batch.color is None:
        return batch
    views = [augment_color(view, color) for view, color in zip(batch.views, batch.color.unbind(1))]
    return replace(batch, views=views, color=None)


def augment_color(views: Tensor, color: Tensor) -> Tensor:
    """Color and normalize uint8 views (B, 3, S, S) by the parameters (B, 11) drawn for them: float32.

    `color` lies on the host, which chooses the images of each operation from it and never waits for the device.
    """
    if views.device.type == "cpu" and len(views) > CPU_CHUNK:
        return torch.cat([augment_color(*part) for part in zip(views.split(CPU_CHUNK), color.split(CPU_CHUNK))])
    x = views.float()
    operations = select_operations(color)
    all_rows = to_device(torch.cat([operation.rows for operation in operations]), x.device)
    parameters = to_device(torch.cat([color, box_taps(color[:, BLUR])], dim=1), x.device)
    for operation, rows in zip(operations, all_rows.split([len(operation.rows) for operation in operations])):
        if len(rows) > 0:
            x.index_copy_(0, rows, operation.apply(x[rows], parameters[rows, operation.columns, None, None]))
    for channel, (mean, std) in enumerate(zip(MEAN, STD)):
        x[:, channel].sub_(255 * mean).div_(255 * std)
    return x


class ColorOperation(NamedTuple):
    """One operation on some images of a batch."""

    apply: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    """(n,) int64: the images that it is applied to."""
    columns: slice
    """The columns of its parameters: those of `color`, then the taps of the blur."""


def select_operations(color: Tensor) -> list[ColorOperation]:
    """Return the operations in the order of their application, each with its images; color (B, 11) on the host."""
    jittered = color[:, FACTORS] != torch.tensor(NEUTRAL[FACTORS])
    operations = [
        ColorOperation(apply, (jittered[:, number] & (order == number)).nonzero()[:, 0], slice(number, number + 1))
        for order in color[:, ORDER].unbind(1)
        for number, apply in enumerate((brightness, contrast, saturation, hue))
    ]
    taps = slice(len(NEUTRAL), None)
    for apply, column in ((grayscale, GRAY), (blur, BLUR), (solarize, SOLARIZE)):
        operations.append(ColorOperation(apply, color[:, column].nonzero()[:, 0], taps))
    return operations


# Every operation takes images (n, 3, S, S), which it may overwrite, and their parameters (n, ·, 1, 1).


def luma(x: Tensor) -> Tensor:
    """Return gray levels (n, 1, S, S)."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by `factor`."""
    return x.mul_(factor).clamp_(0, 255)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between the rounded mean gray level of each image and the image by `factor`."""
    mean = luma(x).mean(dim=(2, 3), keepdim=True).round_()
    return x.lerp_(mean, 1 - factor).clamp_(0, 255)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Interpolate between the gray image and the image by `factor`."""
    return x.lerp_(luma(x), 1 - factor).clamp_(0, 255)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of HSV by a fraction of the color circle; saturation and value stay."""
    red, green, blue = x.split(1, dim=1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    lowest = torch.minimum(low, red)
    chroma = torch.maximum(high, red) - lowest
    # The distance from red in sixths of the color circle, 0..3, signed: positive towards green. The usual formula by
    # the brightest channel needs torch.where, which is slow on the CPU.
    sixths = (high + torch.maximum(low, red)).sub_(red, alpha=2).div_(chroma.clamp(min=1e-6)).add_(1)
    sixths = sixths.copysign_(green - blue).add_(6 * shift).remainder_(6)
    shares = ((sixths - 3).abs_().sub_(1), 2 - (sixths - 2).abs_(), 2 - (sixths - 4).abs_())
    return torch.cat([torch.addcmul(lowest, chroma, share.clamp_(0, 1)) for share in shares], dim=1)


def grayscale(x: Tensor, _: Tensor) -> Tensor:
    """Replace all channels by the gray level."""
    return x.copy_(luma(x))


def solarize(x: Tensor, _: Tensor) -> Tensor:
    """Invert levels of 128 and above; for integer levels this is the minimum of v and 255 - v."""
    return torch.minimum(x, 255 - x)


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """Blur like Pillow: three box filters with the taps (n, T, 1, 1) of each image, edge pixels replicated."""
    size, reach = x.shape[-1], taps.shape[1] // 2
    positions = torch.arange(size, device=x.device)
    offsets = torch.arange(-reach, reach + 1, device=x.device)[:, None, None]
    sources = (positions[:, None] + offsets).clamp_(0, size - 1) == positions
    box = (taps.flatten(1) @ sources.to(x.dtype).flatten(1)).view(-1, 1, size, size)
    kernel = banded(box, banded(box, box, reach), reach)
    return banded(kernel, banded(kernel, x, 3 * reach).mT, 3 * reach).mT


def banded(matrix: Tensor, x: Tensor, reach: int) -> Tensor:
    """Compute matrix @ x for a matrix (n, 1, S, S) that is zero farther than `reach` from its diagonal."""
    spans = [(row, slice(max(0, row - reach), row + BAND_ROWS + reach)) for row in range(0, x.shape[-2], BAND_ROWS)]
    return torch.cat([matrix[..., row : row + BAND_ROWS, span] @ x[..., span, :] for row, span in spans], dim=-2)


def box_taps(sigma: Tensor) -> Tensor:
    """Return the taps (n, T) of the box filter that, applied three times, blurs by sigma (n,); sigma 0 is the identity.

    The fractional length is that of Pillow: Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by
    Extended Box Filtering", 2011.
    """
    variance = sigma.double()[:, None] ** 2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    taps = (whole + fraction + 1 - torch.arange(-reach, reach + 1).abs()).clamp(0, 1)
    return (taps / taps.sum(1, keepdim=True)).float()
