"""LARS as SlotCon uses it, and gradient clipping."""

import math

import numpy as np

from tests.reference.grouping import Array


def norm(values: Array) -> float:
    """The L2 norm of all entries."""
    return math.sqrt(sum(float(value) ** 2 for value in values.flatten()))


def lars_step(
    parameter: Array,
    gradient: Array,
    buffer: Array,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 1e-5,
    trust_coefficient: float = 0.001,
) -> tuple[Array, Array]:
    """g += wd p, g *= 0.001 |p| / |g| (1 where a norm is 0), m = 0.9 m + g, p -= lr m, for one parameter.

    1-D parameters get neither decay nor trust ratio. Returns the new parameter and momentum buffer.
    """
    parameter, gradient, buffer = (np.asarray(x, dtype=np.float64) for x in (parameter, gradient, buffer))
    if parameter.ndim > 1:
        gradient = gradient + weight_decay * parameter
        size, update = norm(parameter), norm(gradient)
        if size > 0 and update > 0:
            gradient = gradient * (trust_coefficient * size / update)
    buffer = momentum * buffer + gradient
    return parameter - lr * buffer, buffer


def clip_global(gradients: list[Array], max_norm: float) -> list[Array]:
    """Scale all gradients by max_norm / |g| where the norm |g| of all of them together is larger."""
    total = math.sqrt(sum(norm(gradient) ** 2 for gradient in gradients))
    return [gradient * min(1.0, max_norm / total) for gradient in gradients]


def clip_each(gradients: list[Array], max_norm: float) -> list[Array]:
    """Scale each gradient by max_norm / |g| where its own norm |g| is larger."""
    return [gradient * min(1.0, max_norm / norm(gradient)) for gradient in gradients]
