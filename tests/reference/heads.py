"""The MLP of projector and slot predictor."""

import math
from collections.abc import Mapping

import numpy as np

from tests.reference.grouping import Array


def linear(rows: Array, weight: Array, bias: Array) -> Array:
    """y = W x + b for every row: (N,I), (O,I), (O,) to (N,O)."""
    result = np.zeros((len(rows), len(weight)))
    for n in range(len(rows)):
        for o in range(len(weight)):
            result[n, o] = float(np.dot(weight[o], rows[n])) + bias[o]
    return result


def batch_norm(rows: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with mean and (biased) variance over the rows."""
    result = np.zeros(rows.shape)
    for d in range(rows.shape[1]):
        mean = sum(rows[:, d]) / len(rows)
        variance = sum((x - mean) ** 2 for x in rows[:, d]) / len(rows)
        for n in range(len(rows)):
            result[n, d] = (rows[n, d] - mean) / math.sqrt(variance + eps) * weight[d] + bias[d]
    return result


def gelu(rows: Array) -> Array:
    """Exact GELU: x Phi(x) = x (1 + erf(x / sqrt 2)) / 2."""
    result = np.zeros(rows.shape)
    for place, x in np.ndenumerate(rows):
        result[place] = 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))
    return result


def mlp(rows: Array, parameters: Mapping[str, Array]) -> Array:
    """Linear - BN - GELU, twice, then linear, on rows (N,I) to (N,O).

    `parameters` carries the published names "0.weight", "0.bias", ...: 0, 3, 6 are linear, 1 and 4 BN.
    """
    p = {name: np.asarray(value, dtype=np.float64) for name, value in parameters.items()}
    for index in (0, 3, 6):
        p[f"{index}.weight"] = p[f"{index}.weight"].reshape(p[f"{index}.weight"].shape[:2])
    rows = np.asarray(rows, dtype=np.float64)
    rows = gelu(batch_norm(linear(rows, p["0.weight"], p["0.bias"]), p["1.weight"], p["1.bias"]))
    rows = gelu(batch_norm(linear(rows, p["3.weight"], p["3.bias"]), p["4.weight"], p["4.bias"]))
    return linear(rows, p["6.weight"], p["6.bias"])


def mlp_on_maps(maps: Array, parameters: Mapping[str, Array]) -> Array:
    """The same MLP as 1x1 convolutions: every position of (B,I,H,W) is a row; to (B,O,H,W)."""
    B, _, H, W = maps.shape
    rows = np.stack([maps[b, :, h, w] for b in range(B) for h in range(H) for w in range(W)])
    outputs = mlp(rows, parameters)
    result = np.zeros((B, outputs.shape[1], H, W))
    for b in range(B):
        for h in range(H):
            for w in range(W):
                result[b, :, h, w] = outputs[(b * H + h) * W + w]
    return result
