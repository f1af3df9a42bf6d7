"""View recipes: how the views of an image are cropped, flipped, rotated, resampled and colored.

A method states its recipes, the workers follow them.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class ColorRecipe:
    """Strengths and probabilities of the color augmentation of a view."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Brightness, contrast and saturation: factors from 1 - strength to 1 + strength; hue: largest shift, as a fraction
    of the color circle."""
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the standard deviation of the Gaussian blur in pixels."""
    solarize_p: float = 0.0


@dataclass(frozen=True)
class OverlapCondition:
    """Which earlier views a crop has to intersect, and by how much."""

    views: tuple[int, ...]
    """Numbers of the earlier views, each of which has to be intersected."""
    min_share: float
    """Smallest area of the intersection, as a share of `relative_to`."""
    relative_to: Literal["crop", "image"]
    """`crop`: at least `min_share` of the sampled target area of this crop; `image`: more than that of the image."""
    tries: int = 10
    """Crops drawn under this condition before one is drawn without it."""


@dataclass(frozen=True)
class ViewRecipe:
    """The distribution of one view of an image."""

    size: int
    """Side of the square view in pixels."""
    scale: tuple[float, float]
    """Range of the area of the crop, as a share of the area of the image."""
    color: ColorRecipe
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the aspect ratio (width over height) of the crop, log-uniform."""
    flip_p: float = 0.5
    rotate: bool = False
    """Whether the view is rotated by 0, 90, 180 or 270 degrees, each with the same probability."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Antialiased resampling filter."""
    overlap: OverlapCondition | None = None


def two_view_recipes(image_size: int, min_scale: float) -> tuple[ViewRecipe, ViewRecipe]:
    """Return the two asymmetric views of BYOL (arXiv 2006.07733), with the overlap of SlotCon (arXiv 2205.15288).

    The first view is always blurred; the second is seldom blurred, sometimes solarized, and has to overlap the first
    by at least 1 % of its own target area.
    """
    first = ViewRecipe(image_size, (min_scale, 1.0), ColorRecipe(blur_p=1.0))
    second = replace(first, color=ColorRecipe(blur_p=0.1, solarize_p=0.2), overlap=OverlapCondition((0,), 0.01, "crop"))
    return first, second
