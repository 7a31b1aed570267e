"""Which classes take part, and with which base measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softsphere import checks
from softsphere._torch import values_on_cpu

__all__ = ["BaseMeasure", "check_mask", "fill_masked", "restrict"]


@dataclass(frozen=True, eq=False)
class BaseMeasure:
    """π, and the classes that take part.

    pi: (C) or (..., C), zero for classes that do not take part; None for π = 1.
    mask: (C) or (..., C), True for classes that take part; None if all do.
    mass: M = Σ π, which is the number of classes that take part: () or (...); None if all do.
    """

    pi: Tensor | None
    mask: Tensor | None = None
    mass: Tensor | None = None

    def mean(self, each: Tensor) -> Tensor:
        """The mean over the classes that take part, of values (..., C)."""
        if self.mask is None or self.mass is None:
            return each.mean(-1)
        return torch.where(self.mask, each, 0.0).sum(-1) / self.mass

    def sum(self, each: Tensor) -> Tensor:
        """The sum over the classes that take part, of values (..., C)."""
        return (each if self.mask is None else torch.where(self.mask, each, 0.0)).sum(-1)


def restrict(
    pi: Tensor | None, mask: Tensor, dtype: torch.dtype, ignored: Tensor | None = None
) -> BaseMeasure:
    """The base measure π (C) of the classes where `mask`, (C) or (..., C), is True.

    It is normalised to the number of those classes, so that each loss is that of the outputs of
    those classes alone. All classes take part in rows that are `ignored`, so that
    nothing there divides by zero.

    Raises ValueError for a row without any class, on a CPU.
    """
    if ignored is not None:
        mask = mask | ignored.unsqueeze(-1)
    _refuse_empty(mask)
    mass = mask.sum(-1).to(dtype)
    if pi is None:
        return BaseMeasure(mask.to(dtype), mask, mass)
    kept = torch.where(mask, pi, 0.0)
    scale = mass / kept.sum(-1, dtype=torch.float64).to(dtype)
    return BaseMeasure(kept * scale.unsqueeze(-1), mask, mass)


def check_mask(mask: Any, input: Tensor, dim: int) -> Tensor:
    """Returns a mask (C), or one with its classes moved to the end.

    Raises ValueError or TypeError if it does not fit the logits `input` with classes at `dim`,
    and on a CPU if a row has no class.
    """
    checks.same_device("mask", mask, "input", input)
    kept = checks.class_mask(mask, input.shape, dim)
    _refuse_empty(kept)
    return kept


def fill_masked(o: Tensor, mask: Tensor) -> Tensor:
    """Returns o with the outputs of masked classes set to 0, even if they were NaN or infinite."""
    return o.masked_fill(~mask, 0.0)


def _refuse_empty(mask: Tensor) -> None:
    if values_on_cpu(mask) and not bool(mask.any(-1).all()):
        raise ValueError(
            "mask must be True for at least one class of each row, got a row where it is False "
            "for all of them; ignore such rows by ignore_index"
        )
