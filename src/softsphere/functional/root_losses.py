"""−log of a softmax of linear outputs at one entry of each row, without a gradient of the outputs.

With Q = softmax(W h + b) less 1 at the entry, and the upstream gradient g of the loss of a row,

    ∂h = g Wᵀ Q,   ∂W = Σ Q (g h)ᵀ,   ∂b = Σ g Q,

so that the backward makes no tensor of the size of the outputs, where those of `F.linear` and
`F.cross_entropy` make two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere._torch import (
    has_hooks_of_all_modules,
    has_own_call,
    hooks_of,
    transformed,
    values_on_cpu,
)
from softsphere.functional.conventions import mixed_precision

__all__ = ["has_root_losses", "is_plain_linear", "root_losses"]


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a call of a layer is F.linear with its weight and bias, and nothing else."""
    changed = type(layer) is not nn.Linear or "forward" in vars(layer) or has_own_call(layer)
    return not (changed or any(hooks_of(layer)) or has_hooks_of_all_modules())


def has_root_losses(layer: nn.Module, H: Tensor) -> bool:
    """Whether `root_losses` computes what a call of the layer with H would lead to."""
    if not is_plain_linear(layer):
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
    """The losses (m), and Q (m, R), through which second derivatives go."""

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, W: Tensor, b: Tensor | None, entry: Tensor, empty: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        o = F.linear(H, W, b)
        if empty is not None:
            o.masked_fill_(empty, -torch.inf)
        index, P = entry.unsqueeze(1), o.softmax(1)
        losses = _less_log(P, o, index)
        Q = P.scatter_add_(1, index, -torch.ones_like(losses))
        ctx.save_for_backward(H, W, index, Q)
        ctx.set_materialize_grads(False)
        return losses.squeeze(1), Q

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, of_Q: Tensor | None) -> tuple[Tensor | None, ...]:
        H, W, index, Q = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if of_Q is None:
            first = (None, None, None) if g is None else _gradients(needs, Q, g, H, W)
            return *first, None, None
        P = Q.scatter_add(1, index, torch.ones_like(index, dtype=Q.dtype))
        of_o = P * (of_Q - (of_Q * P).sum(1, keepdim=True))
        if g is not None:
            of_o = of_o + g.unsqueeze(1) * Q
        return *_gradients(needs, of_o, of_o.new_ones(len(of_o)), H, W), None, None


def _gradients(
    needs: tuple[bool, ...], Q: Tensor, g: Tensor, H: Tensor, W: Tensor
) -> tuple[Tensor | None, ...]:
    """Those with respect to H, W and b, from that with respect to the outputs, g Q."""
    of_row = g.unsqueeze(1)
    return (
        (Q @ W) * of_row if needs[0] else None,
        Q.mT @ (H * of_row) if needs[1] else None,
        g @ Q if needs[2] else None,
    )


def _less_log(P: Tensor, o: Tensor, index: Tensor) -> Tensor:
    """−log of the softmax P of outputs o at an index of each row: (m, 1)."""
    own = P.gather(1, index)
    if values_on_cpu(own) and bool((own >= torch.finfo(own.dtype).tiny).all()):
        return -own.log()
    # the largest output has the largest probability, 1 / Σ exp(o − max o)
    return o.amax(1, keepdim=True) - P.amax(1, keepdim=True).log() - o.gather(1, index)
