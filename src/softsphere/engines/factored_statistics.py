"""(s, q, c) of H Wᵀ from the kept Q and w̄ of a factored W, with its structured gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.matrix import FactoredTensor, StructuredGradient
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.tensors import Content
from softsphere.stats import Stats

__all__ = ["TWICE", "factored_statistics"]

TWICE = (
    "the gradient of a factored layer cannot be differentiated again, nor inside torch.func "
    'transforms; use LinearSphericalLoss with options=LinearSphericalOptions(engine="dense")'
)


def factored_statistics(
    H: Tensor, weight: FactoredTensor, target: Tensor, *, centred: bool
) -> Stats:
    """Statistics of the rows of H (m, w) for targets (m, K), in O(m w²) without an m × D tensor.

    centred: whether the mean of the outputs is taken off, for losses that do not see a shift.
    """
    s, q, c = _FactoredStatistics.apply(H, weight, target, centred)  # type: ignore[no-untyped-call]
    W = weight.matrix.arrays
    pi = None if W.pi is None else W.pi[target]
    return Stats(s, q, c, W.mass, pi=pi)


class _FactoredStatistics(torch.autograd.Function):
    """s = H w̄, q = Σ H∘(H Q), c = H·W[t].

    ∂H_i = g_s w̄ + 2 g_q (HQ)_i + Σ_j g_c W[t_j], and with respect to W (under Π) the structured
    gradient J H with L = 2 g_q H, s = g_s and entries g_c/π_t. Centred, Q is Q − w̄w̄ᵀ/M and
    g_s = −Σ_j g_c/M.
    """

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, weight: FactoredTensor, target: Tensor, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = weight.matrix
        ctx.block, ctx.edition, ctx.centred = weight.block, matrix.edition, centred
        W, d = matrix.arrays, matrix.arrays.width
        sums = W.small("colsum")[:d]
        P = H @ (W.centred_gram() if centred else W.small("gram")[:d, :d])
        s = H @ sums
        q = (P * H).sum(-1).clamp_min(0)
        at_rows = W.rows(target.flatten(), slice(0, d))
        c = (at_rows.view(*target.shape, d) * H.unsqueeze(1)).sum(-1)
        ctx.save_for_backward(H, target, P, s, at_rows)
        if centred:
            return torch.zeros_like(s), q, c - s.unsqueeze(1) / W.mass
        return s, q, c

    @staticmethod
    def backward(
        ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor
    ) -> tuple[Tensor | None, StructuredGradient | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        H, target, P, s, at_rows = ctx.saved_tensors
        matrix = ctx.block.matrix
        if matrix.edition != ctx.edition:
            raise RuntimeError(
                "the factored weight has been changed since this loss was computed; "
                "call backward before the optimizer's step, or compute the loss again"
            )
        W, d = matrix.arrays, matrix.arrays.width
        if ctx.centred:
            gs = -gc.sum(1) / W.mass
        twice = 2 * gq.unsqueeze(1)
        back = torch.addcmul(torch.outer(gs, W.small("colsum")[:d]), twice, P)
        back += (gc.unsqueeze(2) * at_rows.view(*target.shape, d)).sum(1)
        by_hidden = back if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_hidden, None, None, None
        # Copies, since the caller may write into these tensors later.
        rows, x = target.flatten().clone(), gc.flatten().clone()
        if W.pi is not None:
            x = x / W.pi[rows]
        m, K = target.shape
        cols = None if K == 1 else torch.arange(m, device=H.device).repeat_interleave(K)
        by_one = gs - 2 * gq * s / W.mass if ctx.centred else gs.clone()
        value = GradientFactors(H.clone(), twice * H, by_one, rows, cols, x, back.clone(), at_rows)
        by_weight = StructuredGradient(Content(value, ctx.block, ctx.edition))
        return by_hidden, by_weight, None, None
