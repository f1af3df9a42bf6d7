"""How far a result is from its reference, and the slope of a reference."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.grouping import Array


def relative_error(result: ArrayLike, expected: ArrayLike) -> float:
    """Largest difference, as a share of the largest expected magnitude; infinite for other shapes or NaN."""
    result, expected = np.asarray(result, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if result.shape != expected.shape or not np.isfinite(result).all():
        return float("inf")
    scale = float(np.abs(expected).max())
    return float(np.abs(result - expected).max()) / (scale if scale > 0 else 1.0)


def gradient(function: Callable[[Array], float], place: ArrayLike, step: float = 1e-6) -> Array:
    """Central differences (f(x + h) - f(x - h)) / 2h in every entry of x."""
    x = np.array(place, dtype=np.float64)
    slopes = np.zeros(x.shape)
    for entry in np.ndindex(x.shape):
        center = x[entry]
        x[entry] = center + step
        above = function(x)
        x[entry] = center - step
        below = function(x)
        x[entry] = center
        slopes[entry] = (above - below) / (2 * step)
    return slopes
