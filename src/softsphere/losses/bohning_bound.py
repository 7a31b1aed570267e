"""Böhning's quadratic bound of log-softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from softsphere.losses.base import Spherical, less_log_prior
from softsphere.stats import Stats

__all__ = ["BohningBound"]


@dataclass(frozen=True)
class BohningBound(Spherical):
    r"""ℓ = log M + s/M + (q − s²/M)/4 − c − log π_t.

    An upper bound of −log softmax that is tight where all outputs are equal. It is invariant to a
    shift of the outputs. With a base measure it is the same expansion under π, and no longer a
    bound if some π_k < 1.

    Use it to compare with softmax, which it bounds from above, where the outputs are small. The
    bound grows with the square of the outputs, so that confident models pay much for it.

    Partials: s' = 1/M − s/(2M), q' = ¼, c' = −1.
    Source: Böhning 1992 (Annals of the Institute of Statistical Mathematics 44); used as a
    spherical loss by arXiv:1511.05042.

    >>> import torch
    >>> from softsphere.stats import Stats
    >>> o = torch.zeros(4)
    >>> BohningBound().value(Stats(o.sum(), (o * o).sum(), o[:1], mass=4.0)).exp()
    tensor(4.)
    """

    shift_invariant: ClassVar[bool] = True
    upper_bound: ClassVar[bool] = True

    def each(self, x: Stats) -> Tensor:
        log_mass = x.mass.log() if isinstance(x.mass, Tensor) else math.log(x.mass)
        mu = x.s / x.mass
        bound = log_mass + mu + 0.25 * (x.q - x.s * mu)
        return less_log_prior(bound.unsqueeze(-1) - x.c, x)
