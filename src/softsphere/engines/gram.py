"""The engine "gram": (s, q, c) of H Wᵀ + b from the Gram matrix of [W b].

A step costs O(D d²) FLOPs and makes no tensor of m × D entries. Float32 products are exact unless
`torch.set_float32_matmul_precision` allows less; see `bfloat16_parts`.

Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; the Gram identity for squared
losses also in Krichene et al. 2018, arXiv:1807.07187.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere._torch import values_on_cpu
from softsphere.engines import moments
from softsphere.engines.chunked import CHUNKED
from softsphere.engines.engine import Engine, Gradients, Inputs, Settings, Workload
from softsphere.engines.moment_gradients import small_gradient, weight_gradients
from softsphere.engines.moments import Moments
from softsphere.engines.operators import LinearOperator
from softsphere.engines.quadratic_rows import hidden_gradient, loses_digits, quadratic_statistics
from softsphere.engines.target_rows import TargetRows

__all__ = ["GRAM", "guarded_statistics"]


def _forward(x: Inputs, how: Settings) -> tuple[Tensor, ...]:
    """s, q, c, and for the backward P, μ, S, shift and rest.

    The error of q is in proportion to Σ_j h_j² S_jj, not to q itself. `guarded_statistics` looks
    whether q has lost its digits.
    """
    size = moments.chunk_size(x, how.class_chunk, how.dtype)
    at = moments.moments(x, how.centred, size, how.dtype)
    return *quadratic_statistics(x, at), at.S, at.shift, at.rest


def _backward(
    g: Gradients,
    x: Inputs,
    kept: tuple[Tensor, ...],
    how: Settings,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂H, ∂W and ∂b."""
    H, target = x.H, x.target
    P, mu, S, shift, rest = kept
    at = Moments(S, shift, rest, x.mass, how.centred)
    dH = hidden_gradient(x, P, mu, at, g) if needs[0] else None
    if not (needs[1] or needs[2]):
        return dH, None, None
    return dH, *weight_gradients(
        x,
        at,
        small_gradient(H, mu, at, g),
        [TargetRows(H, target, g.c)],
        needs[1:],
        moments.chunk_size(x, how.class_chunk, how.dtype),
        deterministic=how.deterministic,
    )


def guarded_statistics(x: Inputs, how: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """s, q and c, by another way if those of this engine have lost their digits.

    The next ways are this engine in float64, and then the chunked one. Digits are looked at only
    where values can be read without waiting: on a CPU, outside of compiled code.
    """
    wide = torch.float64
    for dtype in (wide,) if how.dtype == wide else (how.dtype, wide):
        # not how._replace(…), which torch 2.6 cannot compile
        this = Settings(how.centred, how.row_chunk, how.class_chunk, dtype, how.deterministic)
        s, q, c, P, _, S, *_ = _OPERATOR.forward_operator(*x, *this)
        if not values_on_cpu(q) or not loses_digits(x.H, P, S):
            return s.to(how.dtype), q.to(how.dtype), c.to(how.dtype)
    return CHUNKED.statistics(x, how)


def _cost(work: Workload) -> float:
    on = work.machine
    each = 1 if work.multiplies_halves else on.float32
    products = 4 * (work.D + work.m) * work.n**2 * each
    passes = on.input * work.m * work.n + on.number * work.D * work.n
    return products + work.target_rows + passes + on.overhead


# kept: P (m, d), μ (m), S (n, n), shift (n) and rest (n)
_OPERATOR = LinearOperator("gram", _forward, _backward, keeps=("md", "m", "nn", "n", "n"))
GRAM = Engine("gram", _OPERATOR, _cost, chunks=("class_chunk",), guarded=guarded_statistics)
