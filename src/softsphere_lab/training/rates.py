"""How the learning rate of a step follows from the step's number."""

from __future__ import annotations

import math

__all__ = ["cosine"]


def cosine(step: int, steps: int, warm_up: float = 0.0) -> float:
    """Returns the factor of the learning rate in a step, counted from 0, of that many steps.

    It rises in a line for the share `warm_up` of the steps, and then falls to 0 along a cosine.

    >>> [round(cosine(step, 8, warm_up=0.25), 2) for step in range(9)]
    [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07, 0.0]
    """
    rise = warm_up * steps
    if step < rise:
        return min(1.0, (step + 1) / rise)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))
