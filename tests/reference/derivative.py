"""The gradient of a reference."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from tests.reference.grouping import Array


def gradient(function: Callable[[Array], float], point: ArrayLike, step: float = 1e-6) -> Array:
    """Central differences (f(x + h) - f(x - h)) / 2h in every entry of x."""
    x = np.array(point, dtype=np.float64)
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
