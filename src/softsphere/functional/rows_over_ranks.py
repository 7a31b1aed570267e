"""What the losses of all layers with a process group have in common: targets, counts and means."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere.functional.conventions import Conventions, mixed_precision
from softsphere.parallel import Agreement, Batch, Shards, sum_of_losses
from softsphere.targets import Targets

__all__ = ["LossOverRanks", "WeightsOfRank", "entries_of_rank"]


class WeightsOfRank(NamedTuple):
    """What an agreement is told of the weights of a layer.

    versions: each names the value of a weight; None where the rank cannot tell.
    rows: weights with rows of this rank alone, which the first agreement about them compares.
    trained: those that may require gradients, with None for one that the layer has not.
    """

    versions: tuple[Any, ...]
    rows: tuple[Tensor, ...]
    trained: Sequence[Tensor | None]


class LossOverRanks(ABC):
    """The loss of the rows of all ranks: first what this rank can check alone, then `value`.

    Args:
        H: (m, w), the rows of this rank.
        given: (…, d), the hidden states that they are. Losses have their shape and dtype.
        entries: the targets of the rows, already checked.
        conventions: with the vectors of the classes of this rank.
        num_items: what the mean divides by; None stands for the number of rows of all ranks that
            are not ignored.

    Raises ValueError or TypeError for num_items that cannot be.
    """

    loss: losses.Loss

    def __init__(
        self,
        H: Tensor,
        given: Tensor,
        entries: Targets,
        loss: losses.Loss,
        conventions: Conventions,
        shards: Shards,
        num_items: Any,
    ) -> None:
        self.items = _checked_items(num_items, conventions.reduction)
        self.H, self.given, self.entries = shards.hidden_for_average(H), given, entries
        self.conventions, self.shards, self.loss = conventions, shards, loss

    def agree(self, agreed: Agreement) -> None:
        """Adds to an agreement what must be the same on all ranks."""
        weights, records = self.weights(), torch.is_grad_enabled()
        self.shards.begin(agreed, weights.versions, self.H, self.entries.t, weights=weights.rows)
        agreed.same(
            loss=self.loss,
            reduction=self.conventions.reduction,
            ignore_index=self.conventions.ignore_index,
            num_items=self.items,
            target_values=self.entries.y is not None,
            hidden_requires_grad=records and self.H.requires_grad,
            trained=[records and x is not None and x.requires_grad for x in weights.trained],
            **self.of_layer(),
        )

    def value(self, agreed: Agreement) -> Tensor:
        """The loss, reduced over the rows of all ranks; with "none", of the rows of this one."""
        batch = self.shards.batch(agreed)
        rows, counted = self.losses_of_rank(batch, agreed)
        if self.conventions.reduction == "none":
            result = rows.view(self.given.shape[:-1])
        else:
            result = self._reduced(rows, counted, batch)
        return result if mixed_precision(self.given) else result.to(self.given.dtype)

    def _reduced(self, rows: Tensor, counted: Tensor, batch: Batch) -> Tensor:
        """The sum or the mean of the losses of the rows of all ranks."""
        total, count = sum_of_losses(torch.stack([rows.sum(), counted.sum()]), batch).unbind()
        if self.conventions.reduction == "sum":
            return total
        return total / (count.detach() if self.items is None else self.items)

    @abstractmethod
    def weights(self) -> WeightsOfRank:
        """What an agreement is told of the weights."""

    @abstractmethod
    def of_layer(self) -> dict[str, Any]:
        """What must be the same on all ranks in a layer of this kind alone, by its name."""

    @abstractmethod
    def losses_of_rank(self, batch: Batch, agreed: Agreement) -> tuple[Tensor, Tensor]:
        """The losses of the rows of this rank (m), and what each of them counts in a mean (m)."""


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


def _checked_items(value: Any, reduction: str) -> float | None:
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
