"""All outputs of a factored W, or those of some classes, with a dense gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.engines.factored_statistics import TWICE
from softsphere.matrix import FactoredTensor
from softsphere.matrix.abstract import Block

__all__ = ["constant_in_transforms", "factored_outputs"]


def factored_outputs(H: Tensor, weight: FactoredTensor, classes: Tensor | None = None) -> Tensor:
    """H Wᵀ of rows H (m, w): (m, D), or (m, n) of the given classes (n).

    The gradient with respect to the weight, which is diag(√π) W, is a dense tensor (D, w). It is
    computed only if autograd needs it. There is no second derivative.
    """
    link = _WeightGradient.apply(weight, H.detach(), classes)  # type: ignore[no-untyped-call]
    return _HiddenGradient.apply(H, link, weight.block, classes)  # type: ignore[no-untyped-call,no-any-return]


class _HiddenGradient(torch.autograd.Function):
    """o = H Wᵀ, with ∂H = g W. The link receives g, for the gradient with respect to the weight."""

    @staticmethod
    def forward(ctx: Any, H: Tensor, link: Tensor, block: Block, classes: Tensor | None) -> Tensor:
        ctx.block, ctx.edition = block, block.matrix.edition
        ctx.save_for_backward(classes)
        W = block.matrix.arrays
        if classes is not None:
            return H @ W.rows(classes, block.columns).mT
        o = H.new_empty(H.shape[0], W.num_rows)
        for part, rows in W.chunks(columns=block.columns):
            o[:, part] = H @ rows.mT
        return o

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        if ctx.block.matrix.edition != ctx.edition:
            raise RuntimeError(
                "the factored weight has been changed since these outputs were computed; call "
                "backward before the optimizer's step, or compute them again"
            )
        if not ctx.needs_input_grad[0]:
            return None, g, None, None
        (classes,) = ctx.saved_tensors
        W, columns = ctx.block.matrix.arrays, ctx.block.columns
        with torch.autocast(g.device.type, enabled=False):
            if classes is not None:
                return g @ W.rows(classes, columns), g, None, None
            dH = g.new_zeros(g.shape[0], W.width)
            for part, rows in W.chunks(columns=columns):
                dH.addmm_(g[:, part], rows)
        return dH, g, None, None


class _WeightGradient(torch.autograd.Function):
    """Zeros in the shape of o = H Wᵀ, whose gradient g becomes that of diag(√π) W: gᵀ H / √π.

    It is a function of its own, so that autograd can leave it out where the weight needs no
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, weight: FactoredTensor, H: Tensor, classes: Tensor | None) -> Tensor:
        ctx.block = weight.block
        ctx.save_for_backward(H, classes)
        n = weight.shape[0] if classes is None else classes.shape[0]
        return H.new_zeros(()).expand(H.shape[0], n)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        H, classes = ctx.saved_tensors
        W = ctx.block.matrix.arrays
        with torch.autocast(g.device.type, enabled=False):
            dW = g.mT @ H
        if classes is not None:
            dW = dW.new_zeros(W.num_rows, W.width).index_add_(0, classes, dW)
        return dW if W.pi is None else dW / W.pi.sqrt().unsqueeze(1), None, None


def constant_in_transforms(x: Tensor, weight: FactoredTensor) -> Tensor:
    """Returns x, which was computed inside a transform that takes the weight for a constant.

    A later gradient with respect to the weight, which such an x does not have, raises RuntimeError.
    """
    return x + _Refused.apply(weight)  # type: ignore[no-untyped-call,no-any-return]


class _Refused(torch.autograd.Function):
    """A zero without a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return torch.zeros((), dtype=weight.dtype, device=weight.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise RuntimeError(TWICE)
