"""The teacher as a moving average of the student."""

import numpy as np

from tests.reference.grouping import Array


def ema(student: Array, teacher: Array, momentum: float) -> Array:
    """theta_k <- m theta_k + (1 - m) theta_q, entry by entry."""
    result = np.zeros(np.shape(teacher))
    for place, value in np.ndenumerate(teacher):
        result[place] = momentum * float(value) + (1 - momentum) * float(student[place])
    return result
