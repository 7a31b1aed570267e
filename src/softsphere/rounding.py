"""Bounds below which a sum of squares is only rounding error.

With the machine epsilon eps, one operation has a relative error of at most eps/2. The sum of n
terms, one after another as in a matrix product, has an error of at most n eps/2 Σ|terms|. If the
errors of single operations are independent with mean zero, it is seldom more than
√n eps/2 Σ|terms|. So outputs that would be equal, each computed as a sum of n terms, differ by no
more than about

    (4 + √n) eps Σ|terms|,

where the 4 stands for the few operations around the sum and for sums in another order. PyTorch
adds up the elements of a tensor in pairs, pairs of pairs and so on. The relative error of such a
sum of n positive numbers is at most about

    (4 + log₂ n) eps.

Every bound in this package against rounding is made from these two, with the number of terms that
were summed and their sizes. The bounds are kept tight, since real differences below them would be
set to zero. What never entered a sum, such as a row that was subtracted exactly before, does not
count. Numbers that were given and not summed are equal only if they are the same.

Source: Higham & Mary 2019, SIAM Journal on Scientific Computing 41 (the bound with √n); Higham
1993, SIAM Journal on Scientific Computing 14 (pairwise sums).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MOST_TERMS", "above_rounding", "error_of_sum", "is_rounding", "spread_of_equals"]

# The terms that a sum within a product in float32 has at most where a large result is relied on.
# More of them, one after another, add up more errors than `quadratic_rows` reckons with.
MOST_TERMS = 1 << 15


def spread_of_equals(terms: int, dtype: torch.dtype) -> float:
    """(4 + √n) eps: how far apart equal sums of n terms may come out, relative to Σ|terms|."""
    return (4 + math.sqrt(terms)) * torch.finfo(dtype).eps


def error_of_sum(terms: int | float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """(4 + log₂ n) eps: the relative error of a pairwise sum of n positive numbers."""
    levels = terms.clamp_min(1).log2() if isinstance(terms, Tensor) else math.log2(max(terms, 1))
    return (4 + levels) * torch.finfo(dtype).eps


def above_rounding(q: Tensor, apart: Tensor, mass: float | Tensor) -> Tensor:
    """q = Σ_k π_k (o_k − μ)², or 0 where equal outputs might have given as much.

    By Popoviciu's inequality numbers that are at most r apart have a variance of at most r²/4.

    Args:
        q: (...), at least 0.
        apart: (...), how far apart equal outputs may have come out.
        mass: M = Σ_k π_k.

    Returns q with zeros; NaN and ∞ stay what they are.
    """
    # Deviations are compared, since the square of `apart` may overflow or vanish.
    equal = ((q.detach() / mass).sqrt() <= apart / 2) & (q.detach() < torch.inf)
    return torch.where(equal, 0.0, q)


def is_rounding(variance: Tensor, mean: Tensor, terms: float | Tensor) -> Tensor:
    """Whether q/M − μ² is no more than the rounding errors of the sums q and s = M μ.

    variance, mean: (...), in the dtype of the sums
    terms: the number of outputs that were summed
    """
    # one relative error from q, and two from the square of μ
    return variance <= 3 * error_of_sum(terms, variance.dtype) * mean * mean
