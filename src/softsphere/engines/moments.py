r"""The second moments of the rows of [W b], and what statistics and gradients they give.

Let w̄ = Σ_k π_k [W b]_k / M be the mean row, x_k = [W b]_k − w̄ the rows without it, h a row of
[H 1], and

    S = Σ_k π_k x_k x_kᵀ        μ = w̄·h,

so that o_k − μ = x_k·h and Σ_k π_k (o_k − μ)² = hᵀ S h. The mean row is always taken off: if rows
have a large common part, WᵀW holds its square, and the digits of everything else are lost beside
it. The statistics are

    s = M μ        q = hᵀSh + M μ²        c_j = x_{t_j}·h + μ,

and centred, which are the statistics of o − μ,

    s = 0          q = hᵀSh               c_j = x_{t_j}·h.

Backward, with a = g_s + 2 g_q μ, or a = −Σ_j g_c / M if centred, A = Σ_i g_q h hᵀ and v = Σ_i a h,

    ∂h = 2 g_q S h + Σ_j g_c x_{t_j} + (M a + Σ_j g_c) w̄
    ∂[W b]_k = π_k (v + 2 A x_k) + Σ_ij [k = t_ij] g_c h_i.

The rows are read in chunks, as W − shift with a shift that is w̄ rounded to their dtype; what the
shift leaves, rest = w̄ − shift, is taken off by algebra. Half-precision rows that are multiplied as
they are have the shift 0. The blocks of W and of b are kept apart: [W b] and [H 1] are never made.
Where float32 products need not be exact, S is made of bfloat16 parts of the rows; `bfloat16_parts`
says which products are, and why.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softsphere.engines.bfloat16_parts import number_of_parts, parts_room
from softsphere.engines.chunk_sums import chunk_sums, chunk_sums_by_parts
from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.weight import chunk_room, chunks, mean_row, read
from softsphere.half_products import multiplies
from softsphere.rounding import MOST_TERMS

__all__ = [
    "Moments",
    "chunk_size",
    "moments",
    "read_as_is",
    "symmetric",
]

# Rows whose mean is the shift.
_SAMPLE = 1024
# Entries of W in a chunk: enough for products at full speed, and few enough that the copy of a
# chunk stays in the cache. What is multiplied as it is has no copy, and fewer chunks are fewer
# additions of a d × d matrix in float64.
_CHUNK, _CHUNK_ON_GPU, _CHUNK_AS_IS = 1 << 21, 1 << 25, 1 << 27


class Moments(NamedTuple):
    """S (n, n), shift (n), rest (n) and M, and whether statistics are to be centred.

    n = d, or d + 1 with a b. The mean row is shift + rest.
    """

    S: Tensor
    shift: Tensor
    rest: Tensor
    mass: float | Tensor
    centred: bool

    @property
    def mean(self) -> Tensor:
        """w̄ in float64."""
        return self.shift.double() + self.rest.double()

    def by_output(self, g: Gradients, mu: Tensor) -> Tensor:
        """The part of ∂ℓ/∂o_k / π_k that is the same for all classes k: a (m)."""
        return -g.c.sum(1) / self.mass if self.centred else g.s + 2 * g.q * mu


def chunk_size(x: Inputs, given: int | None, dtype: torch.dtype) -> int:
    """Rows of W in a chunk, for sums in dtype; at least 256 unless they are given."""
    numbers = _CHUNK_ON_GPU if x.W.is_cuda else _CHUNK
    if read_as_is(x, dtype):
        numbers = _CHUNK_AS_IS
    rows = max(256, numbers // max(x.W.shape[1], 1))
    return given or (rows if x.W.is_cuda else min(rows, MOST_TERMS))


def moments(x: Inputs, centred: bool, size: int, dtype: torch.dtype) -> Moments:
    """The moments of [W b]: sums of `size` rows in dtype, and the sums of those in float64.

    They cost 2 D d² FLOPs, or D d² where the products are symmetric by blocks.
    """
    _, W, b, _, pi = x
    d, n, mass, as_is = W.shape[1], W.shape[1] + (b is not None), x.mass, read_as_is(x, dtype)
    shift = W.new_zeros(n, dtype=dtype) if as_is else _shift(x, size, dtype)
    S, r = W.new_zeros(n, n, dtype=torch.float64), W.new_zeros(n, dtype=torch.float64)
    count, room = number_of_parts(W, dtype), None
    if not as_is:
        room = parts_room(W, size, count) if count else chunk_room(W, size, dtype)
    for part in chunks(len(W), size):
        w, w1 = W[part], None if b is None else b[part]
        weight = None if pi is None else pi[part].to(dtype)
        if room is None:
            upper, row, column = chunk_sums(w, w1, weight, dtype)
        elif count:
            w1 = None if w1 is None else w1.to(dtype) - shift[d]
            upper, row, column = chunk_sums_by_parts(w, w1, weight, shift[:d], room)
        else:
            w, w1 = read(w, w1, shift, dtype, room)
            upper, row, column = chunk_sums(w, w1, weight, dtype)
        S[:d, :d] += upper
        r[:d] += row
        if w1 is not None and column is not None:
            y1 = w1 if weight is None else w1 * weight
            S[:d, d] += column
            S[d, d] += (y1.to(dtype) * w1).sum()
            r[d] += y1.sum(dtype=dtype)
    rest = r / mass
    S = S.addr_(r, rest, alpha=-1).to(dtype)
    return Moments(symmetric(S), shift, rest.to(dtype), mass, centred)


def read_as_is(x: Inputs, dtype: torch.dtype) -> bool:
    """Whether the rows of W are multiplied in half precision, without a copy and without a shift.

    Their common part has been rounded to their few digits anyway.
    """
    return x.pi is None and multiplies(x.W, dtype)


def _shift(x: Inputs, size: int, dtype: torch.dtype) -> Tensor:
    """About the mean row: (n).

    It is the mean of some rows, since reading all rows once more would take a tenth of the time of
    a step. The results are right with any shift, and a shift that is near to the mean keeps their
    digits.
    """
    D, some = len(x.W), _SAMPLE
    if x.pi is not None or some >= D:
        return mean_row(x, size, dtype)
    # multiples of the golden ratio are spread evenly, whatever period the rows have
    at = torch.arange(some, dtype=torch.float64, device=x.W.device)
    places = (at * 0.6180339887498949).frac_().mul_(D).long()
    sample = Inputs(x.H, x.W[places], None if x.b is None else x.b[places], x.target, None)
    return mean_row(sample, size, dtype)


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    return upper.triu() + upper.triu(1).mT
