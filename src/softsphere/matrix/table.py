"""What PyTorch may do with a factored weight and its gradient, operation by operation.

`FactoredTensor` W and `StructuredGradient` G come here for every operation (aten's names). What is
in the table is exact. Steps, multiples and norms cost nothing in D; what reads or writes all of W,
such as initialisation or averaging, costs O(D w²) and needs no D × w memory of its own, but for the
result. An operation that is not in the table raises TypeError and says what to use instead.

With a base measure π the tensor that PyTorch sees is diag(√π) times what the factors hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from softsphere.matrix import changes, copies, lists, reading, sums
from softsphere.matrix.tensors import FactoredTensor, Part, StructuredGradient
from softsphere.matrix.wrapper import OPERATIONS, RULES

__all__ = ["GRADIENT", "LISTS", "WEIGHT"]

aten = torch.ops.aten

WEIGHT: dict[Any, Callable[..., Any]] = {
    aten.detach: copies.same_weight,
    aten.alias: copies.same_weight,
    aten.view: copies.same_view,
    aten._unsafe_view: copies.same_view,
    aten.reshape: copies.same_view,
    aten.clone: copies.clone_weight,
    aten._to_copy: copies.convert_weight,
    aten.empty_like: copies.empty_like_weight,
    aten.zeros_like: copies.zero_gradient,
    aten.new_empty: copies.new_empty,
    aten.embedding: reading.embedding,
    aten.index_select: reading.index_select,
    aten.index: reading.index,
    aten.select: reading.view,
    aten.slice: reading.view,
    aten.t: reading.view,
    aten.transpose: reading.view,
    aten.permute: reading.view,
    aten.mm: reading.product,
    aten.lt: reading.compare,
    aten.gt: reading.compare,
    aten.le: reading.compare,
    aten.ge: reading.compare,
    aten.eq: reading.compare,
    aten.ne: reading.compare,
    aten.isnan: reading.is_nan,
    aten.where: reading.where,
    aten.equal: reading.equal,
    aten.add_: changes.add_weight_,
    aten.sub_: changes.add_weight_,
    aten.add: changes.add_weight,
    aten.sub: changes.add_weight,
    aten.lerp_: changes.lerp_weight_,
    aten.lerp: changes.lerp_weight,
    aten.mul_: changes.scale_weight_,
    aten.div_: changes.scale_weight_,
    aten.mul: changes.scale_weight,
    aten.div: changes.scale_weight,
    aten.neg: changes.negate_weight,
    aten.neg_: changes.negate_weight_,
    aten.zero_: changes.zero_weight_,
    aten.fill_: changes.fill_weight_,
    aten.copy_: changes.copy_weight_,
    aten.uniform_: changes.draw_,
    aten.normal_: changes.draw_,
    aten.erfinv_: changes.elementwise_,
    aten.clamp_: changes.elementwise_,
    aten.masked_fill_: changes.masked_fill_,
    aten.index_put_: changes.index_put_,
    aten.eye: changes.eye_,
    aten.linalg_vector_norm: reading.norm,
    aten.norm: reading.norm,
}
GRADIENT: dict[Any, Callable[..., Any]] = {
    aten.detach: copies.same_gradient,
    aten.alias: copies.same_gradient,
    aten.clone: copies.clone_gradient,
    aten._to_copy: copies.convert_gradient,
    aten.new_empty: copies.new_empty,
    aten.new_empty_strided: copies.empty_gradient,
    aten.empty_like: copies.empty_gradient,
    aten.isnan: reading.is_nan,
    aten.dot: reading.inner_product,
    aten.vdot: reading.inner_product,
    aten.add: sums.add_gradients,
    aten.sub: sums.add_gradients,
    aten.add_: sums.add_gradients_,
    aten.sub_: sums.add_gradients_,
    aten.mul: sums.scale_gradient,
    aten.div: sums.scale_gradient,
    aten.mul_: sums.scale_gradient_,
    aten.div_: sums.scale_gradient_,
    aten.neg: sums.negate_gradient,
    aten.neg_: sums.negate_gradient_,
    aten.zero_: sums.zero_gradient_,
    aten.fill_: sums.fill_gradient_,
    aten.copy_: sums.copy_gradient_,
    aten.linalg_vector_norm: reading.norm,
    aten.norm: reading.norm,
}
LISTS: dict[Any, Callable[..., Any]] = {
    aten._fused_sgd_: lists.fused_sgd,
    aten._amp_foreach_non_finite_check_and_unscale_: lists.unscale,
}


def of_each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on a list of tensors is that on each."""
    name = func.overloadpacket.__name__.removeprefix("_foreach_")
    return lists.foreach(func, getattr(aten, name, None), args, kwargs)


def of_part(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on a part of a weight reads it, or writes it."""
    if reading.writes(func, args):
        return changes.write_part(func, args[0], args[1:], kwargs)
    return reading.of_part(func, args, kwargs)


OPERATIONS.update({FactoredTensor: WEIGHT, StructuredGradient: GRADIENT, list: LISTS})
RULES.update({Part: of_part, list: of_each})
