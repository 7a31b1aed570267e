"""Reads [W b] in chunks of rows and at the targets.

W (D, d) and b (D) or None are never joined, and never copied as a whole. A shift (n) is subtracted
from every row of [W b]. The shift is close to the mean of the rows. n = d, or d + 1 with a b.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softsphere._torch import is_recorded
from softsphere.engines.engine import Inputs, mass_of
from softsphere.rounding import spread_of_equals

__all__ = [
    "add_target_rows",
    "chunk_room",
    "chunks",
    "mean_row",
    "read",
    "recorded_in",
    "spread_of_outputs",
    "sum_dtype",
    "target_outputs",
]


def sum_dtype(H: Tensor, W: Tensor, least: torch.dtype) -> torch.dtype:
    """The dtype of sums: `least`, or a wider one if a tensor has it."""
    return torch.promote_types(torch.promote_types(H.dtype, W.dtype), least)


def chunks(num_classes: int, size: int) -> Iterator[slice]:
    """Slices of `size` classes over all of them."""
    for start in range(0, num_classes, size):
        yield slice(start, min(start + size, num_classes))


def chunk_room(W: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Memory for a chunk of at most `size` rows of W in dtype."""
    return W.new_empty((min(size, len(W)), W.shape[1]), dtype=dtype)


def read(
    W: Tensor, b: Tensor | None, shift: Tensor | None, dtype: torch.dtype, room: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[W b] less the shift (n), in dtype.

    The rows of W are written into `room`; without a shift or a room they may be W's own memory.
    """
    d = W.shape[1]
    column = None if b is None else b.to(dtype)
    if shift is None:
        return W.to(dtype), column
    rows = torch.sub(W, shift[:d], out=None if room is None else room[: len(W)])
    return rows, None if column is None else column - shift[d]


def recorded_in(W: Tensor, b: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """W and b, in dtype where autograd records what is made of them.

    Gradients from several places nearly cancel, and are added before they are rounded: they meet in
    one copy.
    """
    if not is_recorded(W, b):
        return W, b
    return W.to(dtype), None if b is None else b.to(dtype)


def mean_row(x: Inputs, size: int, dtype: torch.dtype) -> Tensor:
    """Σ_k π_k [W b]_k / M, rounded to dtype: (d), or (d + 1) with a b."""
    W, b, pi = x.W, x.b, x.pi
    d = W.shape[1]
    total = W.new_zeros(d + (b is not None), dtype=torch.float64)
    for part in chunks(len(W), size):
        weight = None if pi is None else pi[part].to(dtype)
        total[:d] += W[part].sum(0, dtype=dtype) if weight is None else weight @ W[part].to(dtype)
        if b is not None:
            column = b[part].to(dtype)
            total[d] += (column if weight is None else column * weight).sum()
    return (total / x.mass).to(dtype)


def target_outputs(x: Inputs, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """c = W[t]·h + b[t] (m, K), with the shift subtracted from [W b]."""
    H, W, b, target, _ = x
    H = H.to(dtype)
    c = H.new_empty(target.shape)
    for j, t in enumerate(target.unbind(1)):
        c[:, j] = (_rows_at(W, t, shift, H.dtype) * H).sum(1)
    if b is not None:
        c += b[target].to(H.dtype) if shift is None else b[target].to(H.dtype) - shift[-1]
    return c


def spread_of_outputs(x: Inputs, dtype: torch.dtype) -> Tensor:
    """How far apart the outputs H Wᵀ + b of equal rows [W b] may come out: (m).

    It follows from Σ_j |h_j w̄_j| + |b̄| with the mean row w̄, which is any row if all are equal.
    """
    H, W, b = x.H.detach().to(dtype), x.W.detach(), None if x.b is None else x.b.detach().to(dtype)
    if x.pi is None:
        row, column = W.mean(0, dtype=dtype), None if b is None else b.mean()
    else:
        # not x.mass: the compiler of torch 2.6 cannot trace a property of a named tuple
        weight = (x.pi / mass_of(x.pi, W.shape[0])).to(dtype)
        row, column = weight @ W.to(dtype), None if b is None else weight @ b
    size = H.abs() @ row.abs()
    return spread_of_equals(H.shape[1], dtype) * (size if column is None else size + column.abs())


def add_target_rows(
    out: Tensor, W: Tensor, target: Tensor, gc: Tensor, shift: Tensor | None
) -> None:
    """out (m, d) += Σ_j gc_j (W[t_j] − shift)."""
    for j, t in enumerate(target.unbind(1)):
        out.addcmul_(gc[:, j : j + 1], _rows_at(W, t, shift, out.dtype))


def _rows_at(W: Tensor, t: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = W.index_select(0, t).to(dtype)
    return rows if shift is None else rows - shift[: W.shape[1]]
