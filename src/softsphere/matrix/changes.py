"""Operations that change a factored weight: steps, scaling, and writing all of it in row chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from softsphere.matrix.blocks import Blocks
from softsphere.matrix.copies import copied
from softsphere.matrix.gradient_tensors import StructuredGradient
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.parts import Part
from softsphere.matrix.reading import root, settled
from softsphere.matrix.refusals import foreign, refusal, stale
from softsphere.matrix.tensors import FactoredTensor
from softsphere.matrix.wrapper import Operand, Wrapper

_aten = torch.ops.aten

# Factors of W that the small arrays can take without leaving the range of float64.
_SMALLEST, _LARGEST = 1e-30, 1e30


def plan_step(x: FactoredTensor, g: StructuredGradient, alpha: float) -> Callable[[], None]:
    """Returns a function that adds alpha G to W. Nothing has changed before it is called."""
    if x.block.j != 0:
        raise TypeError("only FactoredSGD can step a momentum buffer of FactoredSGD")
    matrix, content = x.matrix, g.content
    if content.edition is None:
        return lambda: None
    if content.edition != matrix.edition:
        raise stale() if matrix is content.block.matrix else foreign()
    k = matrix.arrays.blocks
    base = tuple(tuple(float(a == b) for b in range(k)) for a in range(k))
    spread = (float(alpha), *(0.0,) * (k - 1))
    return matrix.plan(content.value.to(x.dtype, x.device), Blocks(base, spread))


def _check_shape(x: FactoredTensor, other: Any) -> None:
    """Raises RuntimeError if a tensor cannot be broadcast to W, before a row is written."""
    if isinstance(other, Tensor) and torch.broadcast_shapes(x.shape, other.shape) != x.shape:
        raise RuntimeError(
            f"a tensor of shape {tuple(other.shape)} cannot be broadcast to a factored weight of "
            f"shape {tuple(x.shape)}"
        )


def _rewrite(x: FactoredTensor, change: Callable[[slice, Tensor], Tensor]) -> FactoredTensor:
    """Replaces the rows that PyTorch sees by change(part, rows), a chunk at a time."""

    def inner(part: slice, rows: Tensor) -> Tensor:
        scale = root(x, part)
        return change(part, rows) if scale is None else change(part, rows * scale) / scale

    x.matrix.rewrite_(x.block.j, inner)
    return x


def _overwrite(x: FactoredTensor, fill: Callable[[slice], Tensor | float]) -> FactoredTensor:
    """Replaces the rows that PyTorch sees by fill(part), without reading the old ones."""
    W = x.matrix.arrays
    if W.blocks > 1:
        return _rewrite(x, lambda part, rows: torch.empty_like(rows).copy_(_as_tensor(fill(part))))
    with uninterrupted():
        W.V.own()
        for part in W.V.chunks():
            scale, new = root(x, part), _as_tensor(fill(part)).to(x.device, x.dtype)
            new = new.expand(part.stop - part.start, x.shape[1])
            W.V[part] = new if scale is None else new / scale
        x.matrix.reset_()
    return x


def _as_tensor(x: Operand) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")


def _rows_of(x: Operand, part: slice) -> Operand:
    """The rows of an operand, which may be a factored weight or be broadcast."""
    if isinstance(x, FactoredTensor):
        W = x.matrix.arrays
        W.check()
        rows = W.rows(part, x.block.columns)
        scale = root(x, part)
        return rows if scale is None else rows * scale
    if isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] > 1:
        return x[part]
    return x


def add_weight_(func: Any, x: Tensor, other: Operand, alpha: float = 1) -> Tensor:
    if not isinstance(x, FactoredTensor):
        return cast(Tensor, func(x, cast(FactoredTensor, other).to_dense(), alpha=alpha))
    if isinstance(other, StructuredGradient):
        plan_step(x, other, -alpha if func.overloadpacket is _aten.sub_ else alpha)()
        return x
    _check_shape(x, other)
    held = settled(func, other)
    return _rewrite(x, lambda part, rows: func(rows.clone(), _rows_of(held, part), alpha=alpha))


def add_weight(func: Any, x: Tensor, other: Operand, alpha: float = 1) -> Tensor:
    if isinstance(other, StructuredGradient):
        if func.overloadpacket is not _aten.add or alpha != 1:
            raise refusal(func, "a factored weight")
        # The weight came as a gradient, for example of p.norm() ** 2.
        return torch.add(other, x)
    if not isinstance(x, FactoredTensor):
        return cast(Tensor, func(x, cast(FactoredTensor, other).to_dense(), alpha=alpha))
    _check_shape(x, other)
    held, result = settled(func, other), copied(x, x.device, x.dtype)
    return _rewrite(result, lambda part, rows: func(rows, _rows_of(held, part), alpha=alpha))


def _lerped(rows: Tensor, end: Operand, weight: Operand) -> Tensor:
    ends = end if isinstance(end, Tensor) else torch.full_like(rows, end)
    return rows.lerp(ends, weight)


def lerp_weight_(func: Any, x: Tensor, end: Operand, weight: Operand) -> FactoredTensor:
    if not isinstance(x, FactoredTensor) or isinstance(weight, Wrapper):
        raise refusal(func, "a factored weight")
    _check_shape(x, end)
    held = settled(func, end)
    return _rewrite(x, lambda part, rows: _lerped(rows, _rows_of(held, part), weight))


def lerp_weight(func: Any, x: Tensor, end: Operand, weight: Operand) -> Tensor:
    if not isinstance(x, FactoredTensor) or isinstance(weight, Wrapper):
        raise refusal(func, "a factored weight")
    held, result = settled(func, end), copied(x, x.device, x.dtype)
    return _rewrite(result, lambda part, rows: _lerped(rows, _rows_of(held, part), weight))


def _scaled(func: Any, x: FactoredTensor, factor: Operand) -> FactoredTensor:
    if isinstance(factor, Wrapper) or (isinstance(factor, Tensor) and factor.dim() > 0):
        raise refusal(func, "a factored weight")
    divides = func.overloadpacket in (_aten.div, _aten.div_)
    number = 1 / float(factor) if divides else float(factor)
    if number == 0:
        return _overwrite(x, lambda part: 0.0)
    if number == 1:
        return x
    if not _SMALLEST <= abs(number) <= _LARGEST:  # NaN too
        return _rewrite(x, lambda part, rows: rows * number)
    x.matrix.scale_(x.block.j, number)
    return x


def scale_weight_(func: Any, x: Tensor, factor: Operand) -> FactoredTensor:
    if not isinstance(x, FactoredTensor):
        raise refusal(func, "a factored weight")
    return _scaled(func, x, factor)


def scale_weight(func: Any, x: Tensor, factor: Operand) -> FactoredTensor:
    if not isinstance(x, FactoredTensor):
        if func.overloadpacket is _aten.div:
            raise refusal(func, "a factored weight")
        x, factor = cast(FactoredTensor, factor), x
    result = _scaled(func, copied(x, x.device, x.dtype), factor)
    source, times = x.block.of()
    number = 1 / float(factor) if func.overloadpacket is _aten.div else float(factor)
    if source is not None:
        result.block.multiple = result.matrix.edition, source, times * number
    return result


def negate_weight(func: Any, x: FactoredTensor) -> FactoredTensor:
    return x * -1.0  # type: ignore[return-value]


def negate_weight_(func: Any, x: FactoredTensor) -> FactoredTensor:
    return x.mul_(-1.0)  # type: ignore[return-value]


def zero_weight_(func: Any, x: FactoredTensor) -> FactoredTensor:
    return _overwrite(x, lambda part: 0.0)


def fill_weight_(func: Any, x: FactoredTensor, value: Operand) -> FactoredTensor:
    held = settled(func, value)
    return _overwrite(x, lambda part: held)


def copy_weight_(func: Any, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(x, FactoredTensor):
        return cast(Tensor, func(x, cast(FactoredTensor, source).to_dense()))
    if isinstance(source, StructuredGradient):
        raise refusal(func, "a factored weight")
    if isinstance(source, FactoredTensor) and source.block is x.block:
        return x
    _check_shape(x, source)
    source = cast(Tensor, settled(func, source))
    source = source if isinstance(source, FactoredTensor) else source.expand(x.shape)
    return _overwrite(x, lambda part: cast(Tensor, _rows_of(source, part)))


def draw_(func: Any, x: FactoredTensor, *args: Any, **kwargs: Any) -> FactoredTensor:
    W = x.matrix.arrays
    if W.blocks == 1 and W.pi is None and len(W.V.blocks) == 1:
        # The same seed then gives the same numbers as for an ordinary tensor.
        with uninterrupted():
            W.V.own()
            func(W.V.blocks[0], *args, **kwargs)
            x.matrix.reset_()
        return x
    empty = torch.empty(1, x.shape[1], dtype=x.dtype, device=x.device)

    def drawn(part: slice) -> Tensor:
        return cast(Tensor, func(empty.repeat(part.stop - part.start, 1), *args, **kwargs))

    return _overwrite(x, drawn)


def elementwise_(func: Any, x: FactoredTensor, *args: Any, **kwargs: Any) -> FactoredTensor:
    return _rewrite(x, lambda part, rows: func(rows.clone(), *args, **kwargs))


def masked_fill_(func: Any, x: FactoredTensor, mask: Tensor, value: Operand) -> FactoredTensor:
    """Fills the weight under a mask of one element, as the derivative of a norm does."""
    if mask.numel() != 1:
        raise refusal(func, "a factored weight")
    return fill_weight_(func, x, value) if bool(mask) else x


def index_put_(
    func: Any,
    x: FactoredTensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
) -> FactoredTensor:
    dense = func(x.to_dense(), indices, values, accumulate)
    return _overwrite(x, lambda part: dense[part])


def eye_(func: Any, rows: int, columns: int, *, out: FactoredTensor) -> FactoredTensor:
    dense = torch.eye(rows, columns, dtype=out.dtype, device=out.device)
    return _overwrite(out, lambda part: dense[part])


def write_part(func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Part:
    """Does an operation in place on rows or columns of a weight, all of which is then written."""
    weight = FactoredTensor.alias(part.block)
    dense = weight.to_dense()
    view = dense
    for each, its, named in part.recipe:
        view = each(view, *its, **named)
    func(view, *args, **kwargs)
    _overwrite(weight, lambda rows: dense[rows])
    return part
