"""When a sum of squares is no more than what rounding makes of nothing.

With the machine epsilon eps, one operation has a relative error of at most eps/2. The sum of n
terms then has an error of at most n eps/2 Σ|terms|, and, if the errors of single operations are
independent with mean zero, seldom more than √n eps/2 Σ|terms|. So numbers that would be equal, each
computed as a sum of n terms, differ by no more than about

    (4 + √n) eps Σ|terms|,

where the 4 stands for the few operations around the sum and for sums in another order. Every bound
in this package against rounding is made from this one, with the number of terms that were summed
and their sizes, and it is no larger, since what falls below a bound is lost.

Source: Higham & Mary 2019, SIAM Journal on Scientific Computing 41 (the bound with √n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["above_rounding", "is_rounding", "spread_of_equals"]


def spread_of_equals(terms: int | float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """(4 + √n) eps: how far apart equal sums of n terms may come out, relative to Σ|terms|."""
    root = terms.sqrt() if isinstance(terms, Tensor) else math.sqrt(terms)
    return (4 + root) * torch.finfo(dtype).eps


def above_rounding(q: Tensor, size: Tensor, mass: float | Tensor, terms: int = 0) -> Tensor:
    """q = Σ_k π_k (o_k − μ)², or 0 where equal outputs might have given as much.

    By Popoviciu's inequality numbers that are at most r apart have a variance of at most r²/4.

    Args:
        q: (...), in the dtype in which the outputs were summed.
        size: (...), Σ|terms| of an output: its own absolute value if the outputs were given.
        mass: M = Σ_k π_k.
        terms: the number of terms of this size that were summed to an output; 0 if none were,
            since the mean row was taken off before, or since the outputs were given.

    Returns q with zeros; NaN stays NaN.
    """
    apart = spread_of_equals(terms, q.dtype) * size
    return torch.where(q <= mass * (apart / 2).square(), 0.0, q)


def is_rounding(variance: Tensor, mean: Tensor, terms: float | Tensor) -> Tensor:
    """Whether q/M − μ² is no more than the rounding errors of the sums q and s = M μ.

    variance, mean: (...), in the dtype of the sums
    terms: the number of outputs that were summed
    """
    # one relative error from q, and two from the square of μ
    return variance <= 3 * spread_of_equals(terms, variance.dtype) * mean * mean
