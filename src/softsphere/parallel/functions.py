"""Collectives that autograd can differentiate: each is the derivative of another one.

Every rank has rows of its own. `all_rows` gives each rank the rows of all, and its derivative adds
what the ranks found for a row and gives it to the rank of the row. `own_sums` is the other way
round. All ranks must call them, and must run their backward, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softsphere.parallel.batch import Batch

__all__ = [
    "all_rows",
    "answers_of_all",
    "on_all_ranks",
    "own_part",
    "own_sums",
    "same_on_all",
    "sum_of_losses",
    "sum_of_parts",
]


def all_rows(x: Tensor, batch: Batch) -> Tensor:
    """The rows x (m, …) of all ranks, one rank after the other: (Σ m, …)."""
    return _differentiable(x, batch.gathered, batch.scattered)


def own_sums(x: Tensor, batch: Batch) -> Tensor:
    """The sum over ranks of x (Σ m, …), at the rows of this rank: (m, …)."""
    return _differentiable(x, batch.scattered, batch.gathered)


def answers_of_all(x: Tensor, batch: Batch) -> Tensor:
    """What each rank found for the rows of this one, from its x (Σ m, …): (size, m, …)."""
    return _differentiable(x, batch.sent, batch.returned)


def on_all_ranks(x: Tensor, batch: Batch) -> Tensor:
    """A weight x that all ranks have, whose gradient is the sum over them, with the same bits."""
    return _differentiable(x, Tensor.clone, batch.ranks.sum)


def same_on_all(x: Tensor, batch: Batch) -> Tensor:
    """The rows x (m, …) of all ranks, with which all of them compute the same: (Σ m, …).

    The derivative of each rank is the whole one, so that nothing is added.
    """
    return _differentiable(x, batch.gathered, lambda g: g[batch.own])


def own_part(x: Tensor, batch: Batch) -> Tensor:
    """The rows of this rank (m, …) of an x (Σ m, …) that is the same on all ranks."""
    return _differentiable(x, lambda x: x[batch.own].clone(), batch.gathered)


def sum_of_losses(x: Tensor, batch: Batch) -> Tensor:
    """The sum of x () over the ranks, where each rank differentiates its own part alone."""
    return _differentiable(x, batch.total, lambda g: g)


def sum_of_parts(x: Tensor, batch: Batch) -> Tensor:
    """The sum of x (…) over the ranks, which all of them go on with in different ways."""
    return _differentiable(x, batch.ranks.sum, batch.ranks.sum)


def _differentiable(
    x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """there(x), whose derivative is `back`."""
    out: Tensor = _Linear.apply(x, there, back)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        _refuse_twice()
        return ctx.back(g), None, None


def _refuse_twice() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a layer with a process_group has first derivatives alone; for second ones use one "
            'without, and options=LinearSphericalOptions(engine="dense")'
        )
