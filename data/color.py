"""Color on the device: drawn for each image in the worker, applied to a whole batch at once.

The operations are Pillow's, on float levels 0..255 that are clamped after each of them: brightness, contrast,
saturation and hue in the image's own order, then grayscale, Gaussian blur and solarize.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.batch import MEAN, STD, Batch

# Why not a library: an image, two views of 224 px, costs on one CPU core 25 ms by kornia 0.9 (batches of 64; 7.7
# in pieces of 4), 6.9 by torchvision's v2 transforms, 2.9 by this file. kornia draws one order of the jitters for
# a whole batch, torchvision one of everything for the images of a call; both blur by a Gaussian in a window of
# fixed size, Pillow by box filters of a fractional one.

LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""Pillow's weights of red, green and blue in a gray level."""

# The columns of a view's color parameters.
FACTORS = slice(0, 4)
"""Factors of brightness, contrast and saturation; shift of the hue in turns of the circle."""
ORDER = slice(4, 8)
"""The four jitters, numbered as in FACTORS, in the order in which they are applied."""
GRAY, BLUR, SOLARIZE = 8, 9, 10
"""Grayscale (0 or 1); sigma of the blur in pixels (0: none); solarize (0 or 1)."""
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0)

CPU_CHUNK = 4
"""Images at a time on the CPU, so that what an operation writes is still in the cache for the next."""
BAND_ROWS = 32
"""Rows of a banded matrix that are multiplied at a time."""


@dataclass(frozen=True)
class ColorRecipe:
    """How strongly and how often the colors of a view change."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast, saturation: factors in 1 ± strength; hue: shifts in ± strength turns."""
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0


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
    """The batch with its views colored and normalized, on their device; its `color` is then None."""
    if batch.color is None:
        return batch
    views = [photometric(view, color) for view, color in zip(batch.views, batch.color.unbind(1))]
    return replace(batch, views=views, color=None)


def photometric(views: Tensor, color: Tensor) -> Tensor:
    """Color and normalize uint8 views (B, 3, S, S) by the parameters (B, 11) drawn for them: float32.

    `color` lies on the host and decides there which images take part in what: the host never waits for the
    device.
    """
    if views.device.type == "cpu" and len(views) > CPU_CHUNK:
        return torch.cat([photometric(*part) for part in zip(views.split(CPU_CHUNK), color.split(CPU_CHUNK))])
    x = views.float()
    steps = plan(color)
    rows_of_steps = to_device(torch.cat([step.rows for step in steps]), x.device)
    parameters = to_device(torch.cat([color, box_taps(color[:, BLUR])], dim=1), x.device)
    for step, rows in zip(steps, rows_of_steps.split([len(step.rows) for step in steps])):
        if len(rows) > 0:
            x.index_copy_(0, rows, step.operation(x[rows], parameters[rows, step.columns, None, None]))
    for channel, (mean, std) in enumerate(zip(MEAN, STD)):
        x[:, channel].sub_(255 * mean).div_(255 * std)
    return x


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Step(NamedTuple):
    """One operation on some images of a batch."""

    operation: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    """(n,) int64: the images that take part."""
    columns: slice
    """Where their parameters stand: the columns of `color`, then the taps of the blur."""


def plan(color: Tensor) -> list[Step]:
    """Which images take part in which operation, in the order of application; color (B, 11) on the host."""
    jittered = color[:, FACTORS] != torch.tensor(NEUTRAL[FACTORS])
    steps = [
        Step(operation, (jittered[:, number] & (turn == number)).nonzero()[:, 0], slice(number, number + 1))
        for turn in color[:, ORDER].unbind(1)
        for number, operation in enumerate((brightness, contrast, saturation, hue))
    ]
    taps = slice(len(NEUTRAL), None)
    for operation, column in ((grayscale, GRAY), (blur, BLUR), (solarize, SOLARIZE)):
        steps.append(Step(operation, color[:, column].nonzero()[:, 0], taps))
    return steps


# Every operation takes images (n, 3, S, S), which it may overwrite, and their parameters (n, ·, 1, 1).


def luma(x: Tensor) -> Tensor:
    """Gray levels (n, 1, S, S)."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 255)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = luma(x).mean(dim=(2, 3), keepdim=True).round_()
    return x.lerp_(mean, 1 - factor).clamp_(0, 255)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return x.lerp_(luma(x), 1 - factor).clamp_(0, 255)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` circles; saturation and value stay."""
    red, green, blue = x.split(1, dim=1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    lowest = torch.minimum(low, red)
    chroma = torch.maximum(high, red) - lowest
    # The way from red in sixths of the circle, 0..3, then its side: positive towards green. The usual cases by the
    # brightest channel need torch.where, which is slow on the CPU.
    sixths = (high + torch.maximum(low, red)).sub_(red, alpha=2).div_(chroma.clamp(min=1e-6)).add_(1)
    sixths = sixths.copysign_(green - blue).add_(6 * shift).remainder_(6)
    shares = ((sixths - 3).abs_().sub_(1), 2 - (sixths - 2).abs_(), 2 - (sixths - 4).abs_())
    return torch.cat([torch.addcmul(lowest, chroma, share.clamp_(0, 1)) for share in shares], dim=1)


def grayscale(x: Tensor, _: Tensor) -> Tensor:
    return x.copy_(luma(x))


def solarize(x: Tensor, _: Tensor) -> Tensor:
    """Invert levels from 128 on: of a whole level v and 255 - v, that leaves the smaller."""
    return torch.minimum(x, 255 - x)


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """Pillow's Gaussian: three box filters with the taps (n, T, 1, 1) of each image, edge pixels extended."""
    size, reach = x.shape[-1], taps.shape[1] // 2
    positions = torch.arange(size, device=x.device)
    offsets = torch.arange(-reach, reach + 1, device=x.device)[:, None, None]
    sources = (positions[:, None] + offsets).clamp_(0, size - 1) == positions
    box = (taps.flatten(1) @ sources.to(x.dtype).flatten(1)).view(-1, 1, size, size)
    kernel = banded(box, banded(box, box, reach), reach)
    return banded(kernel, banded(kernel, x, 3 * reach).mT, 3 * reach).mT


def banded(matrix: Tensor, x: Tensor, reach: int) -> Tensor:
    """The product matrix @ x for a matrix (n, 1, S, S) that is zero beyond `reach` from its diagonal."""
    spans = [(row, slice(max(0, row - reach), row + BAND_ROWS + reach)) for row in range(0, x.shape[-2], BAND_ROWS)]
    return torch.cat([matrix[..., row : row + BAND_ROWS, span] @ x[..., span, :] for row, span in spans], dim=-2)


def box_taps(sigma: Tensor) -> Tensor:
    """Taps (n, T) of the box filter whose threefold use blurs by sigma (n,); for sigma 0 it changes nothing.

    The fractional length is Pillow's: Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by
    Extended Box Filtering", 2011.
    """
    variance = sigma.double()[:, None] ** 2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max()) + 1
    taps = (whole + fraction + 1 - torch.arange(-reach, reach + 1).abs()).clamp(0, 1)
    return (taps / taps.sum(1, keepdim=True)).float()
