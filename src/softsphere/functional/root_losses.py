"""−log of a softmax of linear outputs at one entry of each row, without a gradient of the outputs.

With p = softmax(W h + b) and the entry e of a row whose loss has the upstream gradient g,

    ∂h = g (Wᵀp − w_e),   ∂W = Σ p (g h)ᵀ less g h in the rows e,   ∂b = Σ g p less g at e,

so that the backward reads p once for each product, where those of `F.linear` and
`F.cross_entropy` also make two more tensors of its size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere._torch import has_hooks_of_all_modules, has_own_call, hooks_of, transformed
from softsphere.functional.conventions import mixed_precision

__all__ = ["has_root_losses", "root_losses"]


def has_root_losses(layer: nn.Module, H: Tensor) -> bool:
    """Whether `root_losses` computes what a call of the layer with H would lead to."""
    changed = type(layer) is not nn.Linear or "forward" in vars(layer) or has_own_call(layer)
    if changed or any(hooks_of(layer)) or has_hooks_of_all_modules():
        return False
    plain = type(layer.weight) is nn.Parameter and layer.weight.dtype == H.dtype
    known = H.dtype in (torch.float32, torch.float64)
    return plain and known and not mixed_precision(H) and not transformed()


def root_losses(
    H: Tensor, W: Tensor, b: Tensor | None, entry: Tensor, empty: Tensor | None
) -> Tensor:
    """−log softmax(W h + b) of an entry for each row: (m), differentiable any number of times.

    Args:
        H: (m, d), the rows, in float32 or float64 like W (R, d) and b (R) or None.
        entry: (m), integers in [0, R).
        empty: (R), whether an entry has probability 0; None if none has.
    """
    nll, _ = _RootLosses.apply(H, W, b, entry, empty)  # type: ignore[no-untyped-call]
    losses: Tensor = nll
    return losses


class _RootLosses(torch.autograd.Function):
    """The losses (m), and p (m, R), through which second derivatives go."""

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, W: Tensor, b: Tensor | None, entry: Tensor, empty: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        o = F.linear(H, W, b)
        if empty is not None:
            o.masked_fill_(empty, -torch.inf)
        P = o.softmax(1)
        # the largest output has the largest probability, 1 / Σ exp(o − max o)
        most = o.amax(1) - P.amax(1).log()
        ctx.save_for_backward(H, W, entry, P)
        ctx.set_materialize_grads(False)
        return most - o.gather(1, entry.unsqueeze(1)).squeeze(1), P

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, of_P: Tensor | None) -> tuple[Tensor | None, ...]:
        H, W, entry, P = ctx.saved_tensors
        dH, dW, db = (None, None, None) if g is None else _first(ctx, g, H, W, entry, P)
        if of_P is not None:
            G = P * (of_P - (of_P * P).sum(1, keepdim=True))
            dH = _sum(dH, G @ W) if ctx.needs_input_grad[0] else None
            dW = _sum(dW, G.mT @ H) if ctx.needs_input_grad[1] else None
            db = _sum(db, G.sum(0)) if ctx.needs_input_grad[2] else None
        return dH, dW, db, None, None


def _first(
    ctx: Any, g: Tensor, H: Tensor, W: Tensor, entry: Tensor, P: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients with respect to H, W and b from that with respect to the losses."""
    dH = dW = db = None
    of_row = g.unsqueeze(1)
    if ctx.needs_input_grad[0]:
        dH = torch.addmm(W.index_select(0, entry), P, W, beta=-1) * of_row
    if ctx.needs_input_grad[1]:
        rows = H * of_row
        dW = (P.mT @ rows).index_add_(0, entry, rows, alpha=-1)
    if ctx.needs_input_grad[2]:
        db = (g @ P).index_add_(0, entry, g, alpha=-1)
    return dH, dW, db


def _sum(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y
