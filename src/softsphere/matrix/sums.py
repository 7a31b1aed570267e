"""Operations on gradients of factored weights: sums, multiples, and writing into them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from softsphere.matrix.abstract import Block
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_tensors import Content, StructuredGradient
from softsphere.matrix.refusals import refusal, stale
from softsphere.matrix.tensors import FactoredTensor
from softsphere.matrix.wrapper import Operand, Wrapper

_aten = torch.ops.aten


def _plus(one: Content, two: Content, alpha: float) -> tuple[GradientFactors, str | None]:
    """Adds two gradients of one weight; returns the sum and the edition that it belongs to."""
    if two.edition is None:
        return one.value, one.edition
    scaled = two.value if alpha == 1 else two.value * alpha
    if one.edition is None:
        return scaled, two.edition
    if one.edition != two.edition:
        raise stale()
    return one.value + scaled.to(one.value.H.dtype, one.value.H.device), one.edition


def _plus_weight(one: Content, W: FactoredTensor, alpha: float) -> tuple[GradientFactors, str]:
    """Adds a multiple of the weight to a gradient, as weight decay does."""
    edition, factor = W.block.of()
    if one.edition == W.matrix.edition:
        edition, factor = one.edition, 1.0
    content = Content(_multiple(W, alpha * factor), W.block, edition)
    value, edition = _plus(one, content, 1)
    assert edition is not None
    return value, edition


def _multiple(W: FactoredTensor, alpha: float) -> GradientFactors:
    """Returns alpha W as a gradient."""
    return replace(W.matrix.zero(), rho=alpha)


def summed(func: Any, one: Content, two: Any, alpha: float) -> tuple[GradientFactors, str | None]:
    if isinstance(two, StructuredGradient):
        return _plus(one, two.content, alpha)
    if isinstance(two, FactoredTensor) and two.block.j == 0:
        return _plus_weight(one, two, alpha)
    raise TypeError(
        "a structured and a dense gradient of a factored weight cannot be added in place; take the "
        "gradient through its rows or outputs in the same backward call as that of the layer's "
        "loss, or use LinearSphericalLoss, which may be tied to an embedding"
    )


def add_gradients(func: Any, one: Tensor, two: Operand, alpha: float = 1) -> Tensor:
    sign = -alpha if func.overloadpacket is _aten.sub else alpha
    if isinstance(one, StructuredGradient) and isinstance(two, Wrapper):
        return StructuredGradient(Content(*_after(one, summed(func, one.content, two, sign))))
    if not isinstance(two, Tensor):
        raise refusal(func, "the gradient of a factored weight")
    dense = [x.to_dense() if isinstance(x, StructuredGradient) else x for x in (one, two)]
    return cast(Tensor, func(*dense, alpha=alpha))


def _after(
    g: StructuredGradient, result: tuple[GradientFactors, str | None]
) -> tuple[GradientFactors, Block, str | None]:
    return result[0], g.content.block, result[1]


def add_gradients_(func: Any, one: Tensor, two: Operand, alpha: float = 1) -> Tensor:
    if not isinstance(one, StructuredGradient):  # there is a dense gradient already
        return cast(Tensor, func(one, cast(StructuredGradient, two).to_dense(), alpha=alpha))
    sign = -alpha if func.overloadpacket is _aten.sub_ else alpha
    one.content.set(*summed(func, one.content, two, sign))
    return one


def _scaled(func: Any, g: Any, scale: Any) -> GradientFactors:
    divides = func.overloadpacket in (_aten.div, _aten.div_)
    if isinstance(g, Tensor) and not isinstance(g, StructuredGradient) and not divides:
        g, scale = scale, g
    is_number = not isinstance(scale, Tensor) or (
        scale.dim() == 0 and not isinstance(scale, Wrapper)
    )
    if not isinstance(g, StructuredGradient) or not is_number:
        raise refusal(func, "the gradient of a factored weight")
    if divides:
        scale = 1 / scale
    return g.value * cast(Operand, scale)


def scale_gradient(func: Any, g: Operand, scale: Operand) -> StructuredGradient:
    owner = g if isinstance(g, StructuredGradient) else cast(StructuredGradient, scale)
    return StructuredGradient(
        Content(_scaled(func, g, scale), owner.content.block, owner.content.edition)
    )


def scale_gradient_(func: Any, g: Operand, scale: Operand) -> StructuredGradient:
    if not isinstance(g, StructuredGradient):
        raise refusal(func, "the gradient of a factored weight")
    g.content.set(_scaled(func, g, scale), g.content.edition)
    return g


def negate_gradient(func: Any, g: StructuredGradient) -> StructuredGradient:
    return StructuredGradient(Content(g.value * -1.0, g.content.block, g.content.edition))


def negate_gradient_(func: Any, g: StructuredGradient) -> StructuredGradient:
    g.content.set(g.value * -1.0, g.content.edition)
    return g


def zero_gradient_(func: Any, g: StructuredGradient) -> StructuredGradient:
    g.content.set(g.content.block.matrix.zero(), None)
    return g


def fill_gradient_(func: Any, g: StructuredGradient, value: float) -> StructuredGradient:
    if value != 0:
        raise refusal(func, "the gradient of a factored weight")
    g.content.set(g.content.block.matrix.zero(), None)
    return g


def copy_gradient_(func: Any, g: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(g, StructuredGradient):
        return cast(Tensor, func(g, cast(StructuredGradient, source).to_dense()))
    if not isinstance(source, StructuredGradient):
        raise refusal(func, "the gradient of a factored weight")
    g.content.set(source.value.to(g.dtype, g.device), source.content.edition)
    return g
