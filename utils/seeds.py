"""Seeds of random number generators from tuples of numbers."""

import numpy as np


def derive_seed(*key: int) -> int:
    """Return a seed of 64 bits that depends on a tuple of numbers, such as (seed, step, view), alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
