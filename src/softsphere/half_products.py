"""Products of half-precision matrices with float32 results, and float32 matrices as two of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softsphere._torch import products_have_out_dtype, sums_of_float16_are_rounded
from softsphere.rounding import MOST_TERMS

__all__ = [
    "InParts",
    "by_float16",
    "in_parts",
    "largest",
    "multiplies",
    "over_rows",
    "product",
    "rounded",
]

# The terms of a product of parts that a matrix unit sums, and the sums that are in memory at once.
_RUN, _RUNS = 512, 16
# A scale is no smaller, so that it is not subnormal times the eps of a half-precision dtype.
_LEAST = 2.0**-100


def multiplies(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x can be multiplied as it is, for results in dtype.

    The matrix units of a GPU multiply float16 and bfloat16 and sum in float32.
    """
    low = x.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32
    if not (low and x.is_cuda and products_have_out_dtype()):
        return False
    return x.dtype == torch.bfloat16 or not sums_of_float16_are_rounded()


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a b in dtype, for factors in dtype or factors that `multiplies` allows.

    a, b: (m, n) and (n, p), or batches of them.
    """
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype == dtype:
        return multiply(a, b, out=out)
    return multiply(a, b, out_dtype=dtype, out=out)


def over_rows(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    most: int = MOST_TERMS,
) -> Tensor:
    """Σ_k x_k y_kᵀ (d, p) in dtype, of many rows x_k of x (n, d) and y_k of y (n, p).

    Runs of at most `most` rows are multiplied side by side, some at a time, and their sums are
    added in float64.
    """
    if len(x) <= most:
        return product(x.mT, y, dtype, out=out)
    total = functools.reduce(Tensor.add_, _sums_of_runs(x, y, dtype, most))
    return total.to(dtype) if out is None else out.copy_(total)


def _sums_of_runs(x: Tensor, y: Tensor, dtype: torch.dtype, most: int) -> Iterator[Tensor]:
    for part, other in zip(x.split(most * _RUNS), y.split(most * _RUNS), strict=True):
        runs = -(-len(part) // most)
        size = len(part) // runs
        whole = runs * size
        a, b = (z[:whole].unflatten(0, (runs, size)) for z in (part, other))
        yield product(a.mT, b, dtype).sum(0, dtype=torch.float64)
        if whole < len(part):
            yield product(part[whole:].mT, other[whole:], dtype)


def largest(A: Tensor, dim: int | None = None) -> Tensor:
    """The largest size of a number in A, () and not zero; 1 if there is none.

    dim: of the numbers along this dimension, which is kept with the size 1.
    """
    if not A.numel():
        # sums of nothing are 0
        return A.new_ones(()) if dim is None else A.sum(dim, keepdim=True) + 1
    size: Tensor = torch.linalg.vector_norm(A, torch.inf, dim, keepdim=dim is not None)
    return size.clamp_min(max(torch.finfo(A.dtype).tiny, _LEAST))


def rounded(A: Tensor, dtype: torch.dtype, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """A / λ in dtype, and the scale λ, so that small numbers do not vanish in float16.

    dim: along which each vector of A has a scale of its own; None for one scale.
    """
    scale = largest(A, dim)
    # written by one operation
    return torch.div(A, scale, out=torch.empty_like(A, dtype=dtype)), scale


class InParts(NamedTuple):
    """A = λ (B + eps C) for B and C in half precision, their eps, and a scale λ or scales."""

    high: Tensor
    low: Tensor
    scale: Tensor

    def whole(self, dtype: torch.dtype) -> Tensor:
        """A in dtype."""
        eps = torch.finfo(self.high.dtype).eps
        return torch.add(self.high.to(dtype), self.low.to(dtype), alpha=eps).mul_(self.scale)

    @property
    def mT(self) -> InParts:
        """The parts of Aᵀ."""
        return InParts(self.high.mT, self.low.mT, self.scale)

    def after(self, H: Tensor, dtype: torch.dtype) -> Tensor:
        """H A in dtype, for an H that `multiplies` allows."""
        P = product(H, self.low, dtype).mul_(torch.finfo(H.dtype).eps)
        return P.add_(product(H, self.high, dtype)).mul_(self.scale)

    def before(self, H: Tensor, dtype: torch.dtype) -> Tensor:
        """A H in dtype, for an H that `multiplies` allows."""
        P = product(self.low, H, dtype).mul_(torch.finfo(H.dtype).eps)
        return P.add_(product(self.high, H, dtype)).mul_(self.scale)


def in_parts(A: Tensor, dtype: torch.dtype, dim: int | None = None) -> InParts:
    """The parts of A in dtype.

    They have twice the digits of dtype: A is right to eps²/4 or so of its largest entry, or of the
    largest along `dim`.
    """
    high, scale = rounded(A, dtype, dim)
    rest = torch.addcmul(A, high, scale, value=-1)
    low = torch.div(rest, scale * torch.finfo(dtype).eps, out=torch.empty_like(high))
    return InParts(high, low, scale)


def by_float16(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of float32 matrices (m, n) and (n, p), each as the sum of two in float16.

    These sums have 22 bits, two less than float32, and matrix units multiply them exactly. Where
    the units add, they cut off what float32 does not hold. So they sum runs of at most 512 terms,
    and the sums of runs are added elsewhere: then the error should be about that of a float32
    product. The product of the second parts, 2⁻²² of the whole, is left out. Each row of a and each
    column of b has a scale, since those of a factored weight may differ by many powers of ten, and
    small ones count as much as large ones. Beside a number 2¹⁴ times as large, in one row of a or
    column of b, a number has fewer digits.

    Source: Ootomo & Yokota 2022, arXiv:2203.03341, §3. On a CPU the parts are float32 numbers that
    have the digits of float16.
    """
    kind = torch.float16 if a.is_cuda else torch.float32
    a_high, a_low, of_a = in_parts(a, torch.float16, 1)
    b_high, b_low, of_b = in_parts(b, torch.float16, 0)
    a_high, a_low, b_high, b_low = (x.to(kind) for x in (a_high, a_low, b_high, b_low))
    rest = product(a_low, b_high, a.dtype).add_(product(a_high, b_low, a.dtype))
    total = over_rows(a_high.mT, b_high, a.dtype, out, _RUN)
    return total.add_(rest, alpha=torch.finfo(torch.float16).eps).mul_(of_a).mul_(of_b)
