"""Schedules: pure functions of the global optimizer step, which counts from 0 over the whole run."""

import math


def warmup_cosine(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int,
    warmup_multiplier: float = 100,
    final: float = 1e-6,
) -> float:
    """Return the learning rate of a linear warm-up followed by a half cosine, as in SlotCon.

    The warm-up goes from `peak / warmup_multiplier` to `peak` (from 0 if the multiplier is infinite), the half cosine
    from `peak` to `final`, both by iteration.
    """
    if step <= warmup_steps and warmup_steps > 0:
        if math.isinf(warmup_multiplier):
            return peak * step / warmup_steps
        return peak / warmup_multiplier * (1 + (warmup_multiplier - 1) * step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def epoch_cosine(
    step: int,
    total_steps: int,
    peak: float,
    warmup_steps: int,
    steps_per_epoch: int,
    warmup_multiplier: float = 10_000,
) -> float:
    """Return the learning rate of a half cosine to 0 by whole epochs, times a linear warm-up by iteration.

    The factor of the warm-up goes from `1 / warmup_multiplier` to 1.
    """
    epoch, epochs = step // steps_per_epoch, total_steps // steps_per_epoch
    factor = 1 - (1 - step / warmup_steps) * (1 - 1 / warmup_multiplier) if step < warmup_steps else 1.0
    return factor * peak * (1 + math.cos(math.pi * epoch / epochs)) / 2


def half_cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Return a half cosine from `start` at step 0 to `end` after the last step (teacher momentum, weight decay)."""
    return end - (end - start) * (math.cos(math.pi * step / total_steps) + 1) / 2
