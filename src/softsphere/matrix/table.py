"""What PyTorch may do with a factored weight and its gradient, operation by operation.

Every operation (by its aten name) on a `FactoredTensor` or a `StructuredGradient` is looked up
here. The operations in the table are exact. Steps, multiples and norms cost nothing in D. Those
that read or write all of W, such as initialisation or averaging, cost O(D w²), and need no memory
of D × w numbers apart from their result. An operation that is not in the table raises TypeError,
which says what to use instead.

With a base measure π, PyTorch sees diag(√π) times the matrix that the factors hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from softsphere.matrix import changes, copies, lists, reading, sums
from softsphere.matrix.gradient_tensors import StructuredGradient
from softsphere.matrix.parts import Part
from softsphere.matrix.tensors import FactoredTensor
from softsphere.matrix.wrapper import OPERATIONS, RULES

__all__ = ["GRADIENT", "LISTS", "WEIGHT"]

_aten = torch.ops.aten

WEIGHT: dict[Any, Callable[..., Any]] = {
    _aten.detach: copies.same_weight,
    _aten.alias: copies.same_weight,
    _aten.view: copies.same_view,
    _aten._unsafe_view: copies.same_view,
    _aten.reshape: copies.same_view,
    _aten.clone: copies.clone_weight,
    _aten._to_copy: copies.convert_weight,
    _aten.empty_like: copies.empty_like_weight,
    _aten.zeros_like: copies.zero_gradient,
    _aten.new_empty: copies.new_empty,
    _aten.embedding: reading.embedding,
    _aten.index_select: reading.index_select,
    _aten.index: reading.index,
    _aten.select: reading.view,
    _aten.slice: reading.view,
    _aten.t: reading.view,
    _aten.transpose: reading.view,
    _aten.permute: reading.view,
    _aten.mm: reading.multiply,
    _aten.lt: reading.compare,
    _aten.gt: reading.compare,
    _aten.le: reading.compare,
    _aten.ge: reading.compare,
    _aten.eq: reading.compare,
    _aten.ne: reading.compare,
    _aten.isnan: reading.is_nan,
    _aten.where: reading.where,
    _aten.equal: reading.equal,
    _aten.add_: changes.add_weight_,
    _aten.sub_: changes.add_weight_,
    _aten.add: changes.add_weight,
    _aten.sub: changes.add_weight,
    _aten.lerp_: changes.lerp_weight_,
    _aten.lerp: changes.lerp_weight,
    _aten.mul_: changes.scale_weight_,
    _aten.div_: changes.scale_weight_,
    _aten.mul: changes.scale_weight,
    _aten.div: changes.scale_weight,
    _aten.neg: changes.negate_weight,
    _aten.neg_: changes.negate_weight_,
    _aten.zero_: changes.zero_weight_,
    _aten.fill_: changes.fill_weight_,
    _aten.copy_: changes.copy_weight_,
    _aten.uniform_: changes.draw_,
    _aten.normal_: changes.draw_,
    _aten.erfinv_: changes.elementwise_,
    _aten.clamp_: changes.elementwise_,
    _aten.masked_fill_: changes.masked_fill_,
    _aten.index_put_: changes.index_put_,
    _aten.eye: changes.eye_,
    _aten.linalg_vector_norm: reading.norm,
    _aten.norm: reading.norm,
}
GRADIENT: dict[Any, Callable[..., Any]] = {
    _aten.detach: copies.same_gradient,
    _aten.alias: copies.same_gradient,
    _aten.clone: copies.clone_gradient,
    _aten._to_copy: copies.convert_gradient,
    _aten.new_empty: copies.new_empty,
    _aten.new_empty_strided: copies.empty_gradient,
    _aten.empty_like: copies.empty_gradient,
    _aten.isnan: reading.is_nan,
    _aten.dot: reading.inner_product,
    _aten.vdot: reading.inner_product,
    _aten.add: sums.add_gradients,
    _aten.sub: sums.add_gradients,
    _aten.add_: sums.add_gradients_,
    _aten.sub_: sums.add_gradients_,
    _aten.mul: sums.scale_gradient,
    _aten.div: sums.scale_gradient,
    _aten.mul_: sums.scale_gradient_,
    _aten.div_: sums.scale_gradient_,
    _aten.neg: sums.negate_gradient,
    _aten.neg_: sums.negate_gradient_,
    _aten.zero_: sums.zero_gradient_,
    _aten.fill_: sums.fill_gradient_,
    _aten.copy_: sums.copy_gradient_,
    _aten.linalg_vector_norm: reading.norm,
    _aten.norm: reading.norm,
}
LISTS: dict[Any, Callable[..., Any]] = {
    _aten._fused_sgd_: lists.fused_sgd,
    _aten._amp_foreach_non_finite_check_and_unscale_: lists.unscale,
}


def _of_each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does an operation on a list of tensors by the one on each of them."""
    name = func.overloadpacket.__name__.removeprefix("_foreach_")
    return lists.foreach(func, getattr(_aten, name, None), args, kwargs)


def _of_part(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does an operation that reads or writes a part of a weight."""
    if reading.writes(func, args):
        return changes.write_part(func, args[0], args[1:], kwargs)
    return reading.of_part(func, args, kwargs)


OPERATIONS.update({FactoredTensor: WEIGHT, StructuredGradient: GRADIENT, list: LISTS})
RULES.update({Part: _of_part, list: _of_each})
