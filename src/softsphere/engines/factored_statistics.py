"""(s, q, c) of H Wᵀ from what a factored W keeps, with its structured gradient.

A factored matrix keeps its mean row r = w̄/M and G = Σ_k π_k (w_k − r)(w_k − r)ᵀ. A large common
part of the rows of W, which a bias may cancel in the outputs, never enters a sum of squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere._torch import copies, values_on_cpu
from softsphere.engines.products import times
from softsphere.engines.quadratic_rows import error_of_parts
from softsphere.engines.sums_of_outputs import SumsOfOutputs, lost_rows
from softsphere.matrix import FactoredTensor, StructuredGradient
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.factored_matrix import single_matrix
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_tensors import Content
from softsphere.matrix.turns import in_turn
from softsphere.stats import Stats, over_targets

__all__ = ["TWICE", "TWICE_IN_CLUSTERS", "factored_statistics"]

_REFUSED = (
    "the gradient of a factored layer cannot be differentiated again, nor inside torch.func "
    "transforms; use "
)
TWICE = _REFUSED + 'LinearSphericalLoss with options=LinearSphericalOptions(engine="dense")'
TWICE_IN_CLUSTERS = _REFUSED + "a ClusteredLoss with engine='logits'"


def factored_statistics(
    H: Tensor, weight: FactoredTensor, target: Tensor, *, centred: bool
) -> Stats:
    """Statistics of the rows of H (m, w) for targets (m, K), in O(m w²) without an m × D tensor.

    centred: whether the mean of the outputs is taken off, for losses that do not see a shift.
    """
    W = single_matrix(weight.block).arrays
    pi = W.target_pi(target)
    s, q, c = _FactoredStatistics.apply(H, weight, target, pi, centred)  # type: ignore[no-untyped-call]
    return Stats(s, q, c, W.mass, pi=pi)


def _from_outputs(W: Arrays, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x̄·h (n), hᵀGh (n) and G h (n, d) of rows h from their outputs, in the dtype of H."""
    sums = SumsOfOutputs(H, W.mean[: W.width])
    for part, rows in W.chunks(sums.chunk_size(W.V.chunk_size()), W.block(0)):
        sums.add(rows, None if W.pi is None else W.pi[part])
    return sums.found(W.mass, W.total)


class _FactoredStatistics(torch.autograd.Function):
    """s = M μ, q = q_c + M μ², c = μ + H·(W[t] − r), with μ = H r and q_c = Σ H∘(H G).

    The gradient with respect to H_i is 2 g_q (HG)_i + Σ_j g_c (W[t_j] − r) + p r, where
    p = M (g_s + 2 g_q μ) + Σ_j g_c. The gradient with respect to W (under Π) is the structured
    gradient J H with L = 2 g_q H, s = g_s and the entries g_c/π_t. Centred, the statistics are 0,
    q_c and c − μ, and p is 0.
    """

    @staticmethod
    @in_turn
    def forward(
        ctx: Any,
        H: Tensor,
        weight: FactoredTensor,
        target: Tensor,
        pi: Tensor | None,
        centred: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = single_matrix(weight.block)
        ctx.block, ctx.edition, ctx.centred = weight.block, matrix.edition, centred
        W, d = matrix.arrays, matrix.arrays.width
        G = W.small("centred_gram")[:d, :d]
        P = times(H, G)
        # μ may be a small difference of large numbers; in float64 it costs next to nothing.
        mu = (H.double() @ W.mean[:d]).to(H.dtype)
        q = (P * H).sum(-1).clamp_min(0)
        at_rows = W.centred_rows(target.flatten())
        c = (at_rows.view(*target.shape, d) * H.unsqueeze(1)).sum(-1)
        if values_on_cpu(q):
            terms = H.square() @ G.diagonal()
            lost = lost_rows(W, q, terms, error_of_parts(H, G.dtype))
            if bool(lost.any()):
                mu[lost], q[lost], P[lost] = _from_outputs(W, H[lost])
                # Outputs that cancel need every digit of the rows as well.
                t = target[lost]
                exact = W.centred_rows(t.flatten(), rounded=False).view(*t.shape, d)
                c[lost] = (exact * H[lost].unsqueeze(1)).sum(-1).to(H.dtype)
        ctx.save_for_backward(H, target, P, mu, at_rows, pi)
        if centred:
            return torch.zeros_like(mu), q, c
        s = W.mass * mu
        return s, torch.addcmul(q, s, mu), c + mu.unsqueeze(1)

    @staticmethod
    @in_turn
    def backward(
        ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor
    ) -> tuple[Tensor | None, StructuredGradient | None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        H, target, P, mu, at_rows, pi = ctx.saved_tensors
        matrix = single_matrix(ctx.block)
        if matrix.edition != ctx.edition:
            raise RuntimeError(
                "the factored weight has been changed since this loss was computed; "
                "call backward before the optimizer's step, or compute the loss again"
            )
        W, d = matrix.arrays, matrix.arrays.width
        m, K = target.shape
        of_targets = gc.reshape(m, K, 1) * at_rows.view(m, K, d)
        twice, by_target, of_targets = 2 * gq, over_targets(gc), over_targets(of_targets, 1)
        back = torch.addcmul(of_targets, twice.unsqueeze(1), P)
        by_hidden = None
        if ctx.needs_input_grad[0]:
            by_mean = torch.add(by_target, torch.addcmul(gs, twice, mu), alpha=W.mass)
            r = W.small("mean")[:d]
            by_hidden = back.clone() if ctx.centred else torch.addr(back, by_mean, r)
        if not ctx.needs_input_grad[1]:
            return by_hidden, None, None, None, None
        # Copies, since the caller may write into these tensors later.
        rows = target.flatten().clone()
        right, x, by_one = copies([H, gc.flatten(), gs], H.dtype)
        if pi is not None:
            x = x / pi.flatten()
        cols = None if K == 1 else torch.arange(m, device=H.device).repeat_interleave(K)
        if ctx.centred:
            by_one = torch.addcmul(by_target / -W.mass, twice, mu, value=-1)
        L = twice.unsqueeze(1) * H
        value = GradientFactors(right, L, by_one, rows, cols, x, back, at_rows)
        by_weight = StructuredGradient(Content(value, ctx.block, ctx.edition))
        return by_hidden, by_weight, None, None, None
