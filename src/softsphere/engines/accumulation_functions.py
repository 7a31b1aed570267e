"""The autograd functions of `accumulate()`: kept statistics, and the delivery of the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softsphere.engines.accumulation_checks import FIRST_ONLY, wanted_now
from softsphere.engines.engine import Gradients
from softsphere.engines.pending import Share
from softsphere.engines.quadratic_rows import hidden_gradient, quadratic_statistics

if TYPE_CHECKING:
    from softsphere.engines.accumulation import Accumulation

__all__ = ["Delivery", "KeptStatistics", "KeptTotal"]


class KeptStatistics(torch.autograd.Function):
    """s, q (m) and c (m, K) from kept moments.

    W and b, or their stand-ins, are inputs only so that autograd says whether their gradients are
    wanted. They get no gradient from here.
    """

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, W: Tensor, b: Tensor | None, target: Tensor, a: Accumulation
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert a.moments is not None
        with torch.autocast(H.device.type, enabled=False):
            s, q, c, P, mu = quadratic_statistics(a.inputs(H, target), a.moments)
            a.check_digits(H, P)
        ctx.accumulation, ctx.stood_in = a, W is not a.W or b is not a.b
        ctx.save_for_backward(H, target, P, mu)
        return s, q, c

    @staticmethod
    def backward(
        ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor
    ) -> tuple[Tensor | None, None, None, None, None]:
        a: Accumulation = ctx.accumulation
        a.check()
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(FIRST_ONLY)
        wanted = wanted_now(ctx)
        H, target, P, mu = ctx.saved_tensors
        g, back = Gradients(gs, gq, gc), None
        if ctx.needs_input_grad[0]:
            assert a.moments is not None
            with torch.autocast(H.device.type, enabled=False):
                back = hidden_gradient(a.inputs(H, target), P, mu, a.moments, g)
        if any(wanted):
            a.add(H, target, mu, g, wanted)
        return back, None, None, None, None


class KeptTotal(torch.autograd.Function):
    """The kept total row; see `KeptStatistics`, whose arguments stand at the same places."""

    @staticmethod
    def forward(
        ctx: Any, none: Tensor, W: Tensor, b: Tensor | None, target: Tensor, a: Accumulation
    ) -> Tensor:
        assert a.total is not None
        ctx.accumulation, ctx.stood_in = a, W is not a.W or b is not a.b
        return a.total.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None, None, None]:
        a: Accumulation = ctx.accumulation
        a.check()
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(FIRST_ONLY)
        wanted = wanted_now(ctx)
        if any(wanted):
            a.add_to_each_row(g, wanted)
        return None, None, None, None, None


class Delivery(torch.autograd.Function):
    """Has autograd add the accumulated gradients to W and b, so that every hook sees them once.

    They are computed in the backward, and nothing else refers to them. So autograd keeps them as
    `.grad` without a copy, if there was no `.grad` before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Accumulation,
        shares: tuple[list[Share], list[Share]],
        W: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        ctx.accumulation, ctx.shares = a, shares
        return a.W.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.accumulation.gradients(ctx.shares)
