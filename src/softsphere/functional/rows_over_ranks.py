"""What the losses of all layers with a process group have in common: targets, counts and means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softsphere import checks
from softsphere.functional.conventions import Conventions, mixed_precision
from softsphere.parallel import Batch, sum_of_losses
from softsphere.targets import Targets

__all__ = ["checked_items", "entries_of_rank", "finish_over_ranks", "reduce_over_ranks"]


def entries_of_rank(
    hidden: Tensor,
    target: Any,
    values: Any,
    conventions: Conventions,
    num_classes: int,
    dtype: torch.dtype,
) -> Targets:
    """The targets of the rows of this rank, without class weights."""
    leading = hidden.shape[:-1]
    for name, x in (("target", target), ("target_values", values)):
        checks.same_device(name, x, "hidden", hidden)
    if values is not None:
        checks.sparse_rows(leading, target, values)
        target = target.reshape(math.prod(leading), target.shape[-1])
        values = values.reshape(target.shape)
    else:
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(
                "target must hold class indices for a layer with a process_group, got class "
                f"probabilities of {target.dtype}; give K-sparse ones with target_values"
            )
        checks.rows_target(leading, target)
        target = target.reshape(-1)
    return replace(conventions, weight=None).entries(target, values, num_classes, dtype)


def checked_items(value: Any, reduction: str) -> float | None:
    """num_items as a number. Raises ValueError or TypeError for one that cannot be."""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"num_items has a meaning for reduction='mean' alone, got reduction={reduction!r}; "
            "leave it out"
        )
    if isinstance(value, Tensor):
        value = value.item()
    checks.positive("num_items", value)
    return float(value)


def finish_over_ranks(
    rows: Tensor, counted: Tensor, reduction: str, items: float | None, batch: Batch, given: Tensor
) -> Tensor:
    """`reduce_over_ranks`, or the losses (…) of the rows of this rank with "none".

    They are in the dtype of the given hidden states (…, d), except under autocast.
    """
    if reduction == "none":
        result = rows.view(given.shape[:-1])
    else:
        result = reduce_over_ranks(rows, counted, reduction, items, batch)
    return result if mixed_precision(given) else result.to(given.dtype)


def reduce_over_ranks(
    rows: Tensor, counted: Tensor, reduction: str, items: float | None, batch: Batch
) -> Tensor:
    """The sum or the mean of the losses of the rows of all ranks."""
    total, count = sum_of_losses(torch.stack([rows.sum(), counted.sum()]), batch).unbind()
    if reduction == "sum":
        return total
    return total / (count.detach() if items is None else items)
