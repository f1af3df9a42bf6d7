"""Schedules: pure functions of the global step, which counts from 0 over the whole run."""

import math


def warmup_cosine(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int,
    warmup_multiplier: float = 100,
    final: float = 1e-6,
) -> float:
    """Learning rate: linear from `peak / warmup_multiplier` to `peak`, then a half cosine down to `final`."""
    if step <= warmup_steps and warmup_steps > 0:
        return peak / warmup_multiplier * (1 + (warmup_multiplier - 1) * step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def cosine_momentum(step: int, total_steps: int, start: float, end: float = 1.0) -> float:
    """Teacher momentum: a half cosine from `start` at step 0 to `end` at the end of the run."""
    return end - (end - start) * (math.cos(math.pi * step / total_steps) + 1) / 2
