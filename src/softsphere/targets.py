"""Targets as entries: which classes, with which values, and which rows count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere import checks

__all__ = ["PADDING", "Targets", "from_indices", "from_sparse"]

PADDING = -1


@dataclass(frozen=True)
class Targets:
    """t (..., K) class indices, y (..., K) their values (None: one), ignored (...) rows.

    Padding and ignored rows have t = 0 and y = 0, so that every index can be looked up.
    """

    t: Tensor
    y: Tensor | None
    ignored: Tensor


def from_indices(target: Tensor, num_classes: int, ignore_index: int) -> Targets:
    """Class indices (...), one a row."""
    target = target.long()
    ignored = target == ignore_index
    checks.indices(target, ignored, num_classes, f"ignore_index = {ignore_index}")
    return Targets(torch.where(ignored, 0, target).unsqueeze(-1), None, ignored)


def from_sparse(
    target: Tensor,
    values: Tensor,
    num_classes: int,
    ignore_index: int,
    weight: Tensor | None = None,
) -> Targets:
    """K-sparse targets (..., K) with values; those of an index that is repeated add up.

    weight: (C) by which values are multiplied.
    """
    target = target.long()
    # a row of no targets at all is not an ignored one
    ignored = (target == ignore_index).all(-1) & (target.shape[-1] > 0)
    padding = (target == PADDING) | ignored.unsqueeze(-1)
    checks.indices(
        target, padding, num_classes, f"{PADDING} for padding, or a whole row of {ignore_index}"
    )
    t = torch.where(padding, 0, target)
    y = torch.where(padding, 0.0, values if weight is None else values * weight[t])
    return Targets(t, add_up(t, y, ~padding), ignored)


def add_up(t: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """y (..., K) with the values of equal targets t summed at their first place, 0 at the rest."""
    K = t.shape[-1]
    apart = -1 - torch.arange(K, device=t.device)  # padding is equal to nothing
    key, order = torch.where(real, t, apart).sort(stable=True, dim=-1)
    first = torch.ones_like(key, dtype=torch.bool)
    first[..., 1:] = key[..., 1:] != key[..., :-1]
    place = first.cumsum(-1) - 1
    total = torch.zeros_like(y).scatter_add(-1, place, y.gather(-1, order))
    summed = torch.where(first, total.gather(-1, place), 0.0)
    return torch.zeros_like(y).scatter(-1, order, summed)
