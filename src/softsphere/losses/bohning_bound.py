"""Böhning's quadratic bound of log-softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softsphere.losses.base import Spherical, weigh
from softsphere.stats import Partials, Stats

__all__ = ["BohningBound"]


@dataclass(frozen=True)
class BohningBound(Spherical):
    r"""ℓ = log M + s/M + (q − s²/M)/4 − c − log π_t.

    An upper bound of −log softmax, tight where all outputs are equal, and shift-invariant. With
    a base measure it is the same expansion under π, and a bound no more where some π_k < 1.

    Partials: s' = 1/M − s/(2M), q' = ¼, c' = −1.
    Source: Böhning 1992 (Annals of the Institute of Statistical Mathematics 44); used for a
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
        mu = x.s / x.mass
        bound = math.log(x.mass) + mu + 0.25 * (x.q - x.s * mu)
        nll = bound.unsqueeze(-1) - x.c
        return nll if x.pi is None else nll - x.pi.log()

    def partials(self, x: Stats) -> Partials:
        ds = ((1 - 0.5 * x.s) / x.mass).unsqueeze(-1)
        return weigh(x, ds, torch.full_like(ds, 0.25), -torch.ones_like(x.c))
