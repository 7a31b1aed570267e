"""How the learning rate of a step follows from the step's number."""

from __future__ import annotations

import math

__all__ = ["cosine"]


def cosine(step: int, steps: int, warm_up: float = 0.0) -> float:
    """What the rate is multiplied by in a step, counted from 0: up for a share of them, then down.

    >>> [round(cosine(step, 8, warm_up=0.25), 2) for step in range(9)]
    [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07, 0.0]
    """
    rise = warm_up * steps
    if step < rise:
        return min(1.0, (step + 1) / rise)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))
