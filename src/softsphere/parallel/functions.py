"""Collectives that autograd can differentiate: each is the derivative of another one.

Every rank has rows of its own. `all_rows` gives each rank the rows of all, and its derivative adds
what the ranks found for a row and gives it to the rank of the row. `own_sums` is the other way
round. All ranks must call them, and must run their backward, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.parallel.batch import Batch

__all__ = [
    "all_rows",
    "own_part",
    "own_sums",
    "same_on_all",
    "sum_of_losses",
    "sum_of_parts",
]


def all_rows(x: Tensor, batch: Batch) -> Tensor:
    """The rows x (m, …) of all ranks, one rank after the other: (Σ m, …)."""
    out: Tensor = _AllRows.apply(x, batch)  # type: ignore[no-untyped-call]
    return out


def own_sums(x: Tensor, batch: Batch) -> Tensor:
    """The sum over ranks of x (Σ m, …), at the rows of this rank: (m, …)."""
    out: Tensor = _OwnSums.apply(x, batch)  # type: ignore[no-untyped-call]
    return out


def same_on_all(x: Tensor, batch: Batch) -> Tensor:
    """The rows x (m, …) of all ranks, with which all of them compute the same: (Σ m, …).

    The derivative of each rank is the whole one, so that nothing is added.
    """
    out: Tensor = _SameOnAll.apply(x, batch)  # type: ignore[no-untyped-call]
    return out


def own_part(x: Tensor, batch: Batch) -> Tensor:
    """The rows of this rank (m, …) of an x (Σ m, …) that is the same on all ranks."""
    out: Tensor = _OwnPart.apply(x, batch)  # type: ignore[no-untyped-call]
    return out


def sum_of_losses(x: Tensor, batch: Batch) -> Tensor:
    """The sum of x () over the ranks, where each rank differentiates its own part alone."""
    out: Tensor = _SumOfLosses.apply(x, batch)  # type: ignore[no-untyped-call]
    return out


def sum_of_parts(x: Tensor, batch: Batch) -> Tensor:
    """The sum of x (…) over the ranks, which all of them go on with in different ways."""
    out: Tensor = _SumOfParts.apply(x, batch)  # type: ignore[no-untyped-call]
    return out


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return batch.gathered(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        _refuse_twice()
        return ctx.batch.scattered(g), None


class _OwnSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return batch.scattered(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        _refuse_twice()
        return ctx.batch.gathered(g), None


class _SameOnAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return batch.gathered(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g[ctx.batch.own], None


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return x[batch.own].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        _refuse_twice()
        return ctx.batch.gathered(g), None


class _SumOfLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        return batch.total(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return batch.ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        _refuse_twice()
        return ctx.batch.ranks.sum(g), None


def _refuse_twice() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a layer with a process_group has first derivatives alone; for second ones use one "
            'without, and options=LinearSphericalOptions(engine="dense")'
        )
