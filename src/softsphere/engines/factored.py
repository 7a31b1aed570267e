"""(s, q, c) of H Wᵀ from the kept Q and w̄ of a factored W, and the structured gradient by W."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from softsphere.matrix import FactoredMatrix, StructuredGradient
from softsphere.stats import Stats

__all__ = ["TOKEN", "Recorder", "statistics"]

# Too small to count in a norm over all parameters; a power of two, so that sums of it are exact.
TOKEN = 2.0**-100


class Recorder(Protocol):
    """Who keeps the gradient by W until an optimizer asks for it."""

    matrix: FactoredMatrix

    def record(self, gradient: StructuredGradient) -> None: ...


def statistics(
    H: Tensor, anchor: Tensor, target: Tensor, recorder: Recorder, *, centred: bool
) -> Stats:
    """Statistics of the rows of H (m, d) for targets (m, K), in O(m d²); no m × D tensor.

    anchor: a scalar that requires a gradient, so that W has one even where H has none.
    centred: as for logits.
    """
    matrix = recorder.matrix
    found: list[StructuredGradient] = []
    wanted = Delivery.apply(anchor, recorder, found)  # type: ignore[no-untyped-call]
    s, q, c = FactoredStatistics.apply(H, wanted, target, matrix, centred, found)  # type: ignore[no-untyped-call]
    pi = None if matrix.pi is None else matrix.pi[target]
    return Stats(s, q, c, matrix.mass, pi=pi)


class Delivery(torch.autograd.Function):
    """Hands the gradient by W over, if it is asked for: `autograd.grad` by hidden alone is not.

    The anchor gets TOKEN as its gradient, or nan where that by W is not finite, so that what scales
    and checks gradients by parameters can do so: see FactoredSphericalLoss.current_gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, recorder: Recorder, found: list[StructuredGradient]
    ) -> Tensor:
        ctx.recorder, ctx.found = recorder, found
        return anchor.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, zero: Tensor) -> tuple[Tensor, None, None]:
        ctx.recorder.record(ctx.found[0])
        return zero + TOKEN, None, None


class FactoredStatistics(torch.autograd.Function):
    """s = H w̄, q = Σ H∘(H Q), c = H·W[t].

    ∂H_i = g_s w̄ + 2 g_q (HQ)_i + Σ_j g_c W[t_j], and by W (under Π) the structured gradient
    J H with L = 2 g_q H, s = g_s and entries g_c/π_t. Centred, Q is Q − w̄w̄ᵀ/M and g_s = −Σ_j g_c/M.
    """

    @staticmethod
    def forward(
        ctx: Any,
        H: Tensor,
        wanted: Tensor,
        target: Tensor,
        matrix: FactoredMatrix,
        centred: bool,
        found: list[StructuredGradient],
    ) -> tuple[Tensor, Tensor, Tensor]:
        d = matrix.width
        sums = matrix.small("colsum")[:d]
        P = H @ (matrix.centred_gram() if centred else matrix.small("gram")[:d, :d])
        s = H @ sums
        q = (P * H).sum(-1).clamp_min(0)
        at_rows = matrix.rows(target.flatten(), slice(0, d))
        c = (at_rows.view(*target.shape, d) * H.unsqueeze(1)).sum(-1)
        ctx.matrix, ctx.edition, ctx.centred, ctx.found = matrix, matrix.edition, centred, found
        ctx.save_for_backward(H, target, P, s, at_rows)
        if centred:
            return torch.zeros_like(s), q, c - s.unsqueeze(1) / matrix.mass
        return s, q, c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None, None]:
        H, target, P, s, at_rows = ctx.saved_tensors
        matrix = ctx.matrix
        if matrix.edition != ctx.edition:
            raise RuntimeError(
                "the factored weight has been changed since this loss was computed; "
                "call backward before the optimizer's step, or compute the loss anew"
            )
        d = matrix.width
        if ctx.centred:
            gs = -gc.sum(1) / matrix.mass
        twice = 2 * gq.unsqueeze(1)
        back = torch.addcmul(torch.outer(gs, matrix.small("colsum")[:d]), twice, P)
        back += (gc.unsqueeze(2) * at_rows.view(*target.shape, d)).sum(1)
        rows = target.flatten()
        x = gc.flatten() if matrix.pi is None else gc.flatten() / matrix.pi[rows]
        m, K = target.shape
        cols = None if K == 1 else torch.arange(m, device=H.device).repeat_interleave(K)
        by_one = gs - 2 * gq * s / matrix.mass if ctx.centred else gs
        ctx.found[:] = [StructuredGradient(H, twice * H, by_one, rows, cols, x, back, at_rows)]
        # zero, or nan
        return back, 0 * (gs.sum() + back.sum()), None, None, None, None
