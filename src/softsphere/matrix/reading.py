"""Operations that read a factored weight or its gradient: rows, products, norms, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from softsphere._torch import values_on_cpu, written_arguments
from softsphere.matrix.gradient_tensors import StructuredGradient
from softsphere.matrix.parts import Part
from softsphere.matrix.refusals import refusal, stale
from softsphere.matrix.tensors import FactoredTensor
from softsphere.matrix.wrapper import Operand, Wrapper

_aten = torch.ops.aten


def root(x: FactoredTensor | Part, part: Tensor | slice) -> Tensor | None:
    """√π of those rows (n, 1), or None if π is one everywhere."""
    pi = x.block.matrix.arrays.pi
    return None if pi is None else pi[part].sqrt().unsqueeze(1)


def _face_rows(x: FactoredTensor | Part, index: Tensor) -> Tensor:
    """The rows (n, w) that PyTorch sees: those of W times √π."""
    W = x.block.matrix.arrays
    W.check()
    rows = W.rows(index.to(x.device), x.block.columns)
    scale = root(x, index)
    return rows if scale is None else rows * scale


def _face_chunks(x: FactoredTensor | Part) -> Any:
    """Yields (slice of rows, the rows that PyTorch sees) over all rows."""
    W = x.block.matrix.arrays
    W.check()
    for part, rows in W.chunks(columns=x.block.columns):
        scale = root(x, part)
        yield part, rows if scale is None else rows * scale


def _check_range(index: Tensor, least: int, size: int) -> None:
    """Raises IndexError, on a CPU, for an index that is not in [least, size)."""
    if not values_on_cpu(index) or not index.numel():
        return
    for found in index.aminmax():
        if not least <= int(found) < size:
            raise IndexError(f"index out of range: got {int(found)}, not in [{least}, {size})")


def embedding(func: Any, x: FactoredTensor, index: Tensor, *_: Any) -> Tensor:
    _check_range(index, 0, len(x))
    return _face_rows(x, index.flatten()).view(*index.shape, x.shape[1])


def index_select(func: Any, x: FactoredTensor, dim: int, index: Tensor) -> Tensor:
    if not -2 <= dim < 2:
        raise IndexError(f"dim must be from -2 to 1, got {dim}")
    if dim % 2 == 0:
        _check_range(index, 0, len(x))
        return _face_rows(x, index.reshape(-1))
    return torch.cat([rows.index_select(1, index) for _, rows in _face_chunks(x)])


def index(func: Any, x: FactoredTensor, indices: Sequence[Tensor | None]) -> Tensor:
    rows, *columns = indices
    if rows is None:
        raise refusal(func, x.described)
    if rows.dtype in (torch.bool, torch.uint8):
        if rows.shape != x.shape[:1]:
            raise refusal(func, x.described)
        rows = rows.nonzero().squeeze(1)
    rows = _from_zero(rows, len(x))
    if not columns or columns[0] is None:
        return _face_rows(x, rows.flatten()).view(*rows.shape, x.shape[1])
    rows, places = torch.broadcast_tensors(rows, _from_zero(columns[0], x.shape[1]))
    found = _face_rows(x, rows.flatten()).view(*rows.shape, x.shape[1])
    return found.gather(-1, places.unsqueeze(-1)).squeeze(-1)


def _from_zero(index: Tensor, size: int) -> Tensor:
    """An index of which some numbers count from the end, counted from zero."""
    _check_range(index, -size, size)
    return torch.where(index < 0, index + size, index)


def view(func: Any, x: FactoredTensor, *args: Any, **kwargs: Any) -> Tensor:
    part = Part(x.block, [(func, args, kwargs)])
    return _whole(part) if part.shape == x.shape and part.stride() == x.stride() else part


def _whole(part: Part) -> FactoredTensor:
    return FactoredTensor.alias(part.block)


_TRANSPOSING = (_aten.t, _aten.transpose, _aten.permute)


def _is_transpose(part: Tensor) -> bool:
    """Whether a tensor is Wᵀ."""
    return (
        isinstance(part, Part)
        and len(part.recipe) == 1
        and part.recipe[0][0].overloadpacket in _TRANSPOSING
        and part.shape[0] == part.block.matrix.arrays.width
    )


def _read(part: Part, func: Any) -> Tensor:
    """Computes the numbers of a part, which are fewer than D × w."""
    (first, args, kwargs), *rest = part.recipe
    W = part.block.matrix.arrays
    if first.overloadpacket in _TRANSPOSING:
        raise refusal(func, "the transpose of a factored weight")
    dim = args[0] % 2 if args else 0
    chosen = first(
        torch.arange(W.num_rows if dim == 0 else W.width, device="cpu"), 0, *args[1:], **kwargs
    )
    chosen = chosen.reshape(-1)
    if dim == 0:
        found = _face_rows(part, chosen)
    else:
        found = torch.cat([rows[:, chosen] for _, rows in _face_chunks(part)])
    if first.overloadpacket is _aten.select:
        found = found.squeeze(dim)
    for view, its, named in rest:
        found = view(found, *its, **named)
    return found


def settled(func: Any, x: Operand) -> Operand:
    """Returns an operand of a change in place, with the numbers that a part has before it.

    The rows of a weight are written in chunks, so that a part of it would not stay as it was.
    """
    return _read(x, func) if isinstance(x, Part) else x


def writes(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation writes its first argument, a part of a weight.

    Raises TypeError if it writes into a part that is another argument.
    """
    written = [
        isinstance(x, Part) and writes
        for writes, x in zip(written_arguments(func), args, strict=False)
    ]
    if any(written[1:]):
        raise refusal(func, "a part of a factored weight")
    return bool(written) and written[0]


def of_part(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does an operation on a part: another view, a product with Wᵀ, or one on its numbers."""
    packet = func.overloadpacket
    first = args[0]
    if packet in (_aten.detach, _aten.alias):
        return Part(first.block, first.recipe)
    if func.is_view:
        if _is_transpose(first) and packet in _TRANSPOSING:
            return _whole(first)
        return Part(first.block, [*first.recipe, (func, args[1:], kwargs)])
    if packet is _aten.mm and _is_transpose(args[1]):
        return _times_transpose(*args)
    if packet is _aten.addmm and _is_transpose(args[2]) and not kwargs:
        return _times_transpose(*args[1:]) + args[0]
    values = [_read(x, func) if isinstance(x, Part) else x for x in args]
    named = {k: _read(x, func) if isinstance(x, Part) else x for k, x in kwargs.items()}
    return func(*values, **named)


def _times_transpose(H: Tensor, part: Part) -> Tensor:
    """H Wᵀ (m, D), a chunk of rows of W at a time."""
    if H.shape[1] != part.shape[0]:
        shapes = f"{tuple(H.shape)} and {tuple(part.shape)}"
        raise RuntimeError(f"shapes {shapes} cannot be multiplied")
    out = H.new_empty(len(H), part.shape[1])
    for columns, rows in _face_chunks(part):
        out[:, columns] = H @ rows.mT
    return out


def multiply(func: Any, one: Tensor, two: Tensor) -> Tensor:
    if one.shape[1] != two.shape[0]:
        shapes = f"{tuple(one.shape)} and {tuple(two.shape)}"
        raise RuntimeError(f"shapes {shapes} cannot be multiplied")
    if isinstance(two, FactoredTensor) and not isinstance(one, Wrapper):
        out = one.new_zeros(len(one), two.shape[1])
        for part, rows in _face_chunks(two):
            out.addmm_(one[:, part], rows)
        return out
    if isinstance(one, FactoredTensor) and not isinstance(two, Wrapper):
        return torch.cat([rows @ two for _, rows in _face_chunks(one)])
    raise refusal(func, "a factored weight")


def compare(func: Any, x: FactoredTensor, other: Operand) -> Tensor:
    """Compares with a number, as initialisers of PyTorch do that draw again beyond a bound."""
    if isinstance(other, Tensor) and other.dim() > 0:
        raise refusal(func, "a factored weight")
    return torch.cat([func(rows, other) for _, rows in _face_chunks(x)])


def is_nan(func: Any, x: FactoredTensor | StructuredGradient) -> Tensor:
    """Whether each number is NaN: (D, w)."""
    finite = x.is_finite()
    return ~finite[:1, :1].expand(x.shape) if finite.stride() == (0, 0) else x.to_dense().isnan()


def where(func: Any, mask: Tensor, one: Operand, two: Operand) -> Tensor:
    def dense(x: Operand) -> Operand:
        return x.to_dense() if isinstance(x, FactoredTensor) else x

    return cast(Tensor, func(mask, dense(one), dense(two)))


def equal(func: Any, one: Tensor, two: Tensor) -> bool:
    dense = [x.to_dense() if isinstance(x, FactoredTensor) else x for x in (one, two)]
    return torch.equal(*dense)


def _square_norm(x: FactoredTensor | StructuredGradient) -> Tensor:
    """tr(xᵀx)."""
    if isinstance(x, StructuredGradient):
        return x.content.block.matrix.dot(x.content.current(), x.value)
    W = x.matrix.arrays
    W.check()
    return W.squares()[x.block.columns].sum()


def norm(
    func: Any,
    x: FactoredTensor | StructuredGradient,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Tensor:
    if (ord not in (2, "fro", None)) or dim not in (None, [], [0, 1]) or keepdim:
        raise TypeError(
            f"only the 2-norm of all of {x.described} can be computed without its D × d numbers, "
            f"got the norm of order {ord} with dim={dim}; use the 2-norm, or to_dense()"
        )
    return _square_norm(x).clamp_min(0).sqrt().to(dtype or x.dtype)


def inner_product(func: Any, one: Tensor, two: Tensor) -> Tensor:
    if not (isinstance(one, StructuredGradient) and isinstance(two, StructuredGradient)):
        raise refusal(func, "the gradient of a factored weight")
    if len({one.content.edition, two.content.edition} - {None}) > 1:
        raise stale()
    matrix = one.content.block.matrix
    return matrix.dot(one.content.current(), two.content.current()).to(one.dtype)
