"""Sample the images or prototypes that a figure shows."""

from collections.abc import Sequence

import numpy as np

DEFAULT_SAMPLING = 20
"""The number of images or prototypes in a figure."""


def sample_sorted(candidates: Sequence[int], count: int, seed: int) -> list[int]:
    """Return at most `count` of the candidates, sampled without replacement, in the order of `candidates`."""
    chosen = np.random.default_rng(seed).permutation(len(candidates))[:count]
    return [candidates[position] for position in sorted(chosen.tolist())]
