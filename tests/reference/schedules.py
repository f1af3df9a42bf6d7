"""Learning rate and teacher momentum as functions of the step t, counted from 0."""

import math


def warmup_cosine(t: int, T: int, peak: float, W: int, warmup_multiplier: float = 100.0, final: float = 1e-6) -> float:
    """lr/100 (1 + 99 t/W) up to W, then 1e-6 + (lr - 1e-6)(1 + cos(pi (t-W)/(T-W))) / 2."""
    if t < W:
        return peak / warmup_multiplier * (1 + (warmup_multiplier - 1) * t / W)
    return final + (peak - final) * (1 + math.cos(math.pi * (t - W) / (T - W))) / 2


def cosine_momentum(t: int, T: int, start: float = 0.99, end: float = 1.0) -> float:
    """1 - (1 - 0.99)(cos(pi t/T) + 1) / 2."""
    return end - (end - start) * (math.cos(math.pi * t / T) + 1) / 2
