"""Learning rate, weight decay and teacher momentum as functions of the step t, counted from 0."""

import math


def warmup_cosine(t: int, T: int, peak: float, W: int, start: float, final: float = 1e-6) -> float:
    """Linear from `start` at t = 0 to `peak` at t = W, then 1e-6 + (lr - 1e-6)(1 + cos(pi (t-W)/(T-W))) / 2."""
    if t < W:
        return start + (peak - start) * t / W
    return final + (peak - final) * (1 + math.cos(math.pi * (t - W) / (T - W))) / 2


def epoch_cosine(t: int, steps_per_epoch: int, E: int, peak: float, W: int, factor: float = 1e-4) -> float:
    """lr (1 + cos(pi e/E)) / 2 in epoch e, times 1 - (1 - t/W)(1 - 1e-4) in the first W steps."""
    rate = peak * (1 + math.cos(math.pi * (t // steps_per_epoch) / E)) / 2
    return rate * (1 - (1 - t / W) * (1 - factor)) if t < W else rate


def cosine(t: int, T: int, start: float, end: float) -> float:
    """end - (end - start)(cos(pi t/T) + 1) / 2: teacher momentum 0.99 to 1, weight decay 0.04 to 0.4."""
    return end - (end - start) * (math.cos(math.pi * t / T) + 1) / 2
