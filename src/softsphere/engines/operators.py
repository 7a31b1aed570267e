"""What the operators of several engines do alike: upstream gradients in, gradients out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["differentiable_once", "empty_gradients", "upstream", "where_needed"]


def differentiable_once(backward: Any) -> None:
    """Has a second derivative, which the operator of a backward has no formula for, say so."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            "this engine has first derivatives alone; for second ones use "
            'options=LinearSphericalOptions(engine="dense")'
        )

    backward.register_autograd(refuse)


def upstream(
    gs: Tensor | None, gq: Tensor | None, gc: Tensor | None, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of s (m), q (m) and c (m, K), zero where nothing depends on them."""
    m, K = target.shape

    def zeros(*shape: int) -> Tensor:
        return target.new_zeros(shape, dtype=dtype)

    return (
        zeros(m) if gs is None else gs,
        zeros(m) if gq is None else gq,
        zeros(m, K) if gc is None else gc,
    )


def empty_gradients(
    H: Tensor, W: Tensor, b: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for ∂H, ∂W and ∂b; of no entries where not needed, since operators return tensors."""
    return (
        H.new_empty(H.shape if needs[0] else 0),
        W.new_empty(W.shape if needs[1] else 0),
        H.new_empty(0) if b is None else b.new_empty(b.shape if needs[2] else 0),
    )


def where_needed(
    grads: tuple[Tensor, Tensor, Tensor], needs: list[bool]
) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
