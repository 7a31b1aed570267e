"""Which classes take part, and with which base measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softsphere import checks
from softsphere._torch import values_on_cpu

__all__ = [
    "BaseMeasure",
    "check_mask",
    "check_mask_of_all_rows",
    "fill_masked",
    "refuse_empty",
    "restrict",
]


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
    refuse_empty(mask)
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
    refuse_empty(kept)
    return kept


def check_mask_of_all_rows(mask: Any, num_classes: int, name: str, input: Tensor) -> Tensor:
    """Returns a mask (C).

    Raises ValueError or TypeError for anything else, and unless it is on the device of `input`,
    which the caller knows as `name`.
    """
    checks.same_device("mask", mask, name, input)
    shape = torch.Size([num_classes])
    if isinstance(mask, Tensor) and mask.shape != shape:
        of_rows = (
            "; a mask for each row needs the logits: use spherical_loss or SphericalLoss on the "
            "logits of an nn.Linear"
        )
        raise ValueError(
            f"mask must have shape ({num_classes},), one entry per class for all rows, got "
            f"{tuple(mask.shape)}{of_rows if mask.dim() > 1 else ''}"
        )
    return checks.class_mask(mask, shape, 0)


def fill_masked(o: Tensor, mask: Tensor) -> Tensor:
    """Returns o with the outputs of masked classes set to 0, even if they were NaN or infinite."""
    return o.masked_fill(~mask, 0.0)


def refuse_empty(mask: Tensor) -> None:
    """Raises ValueError, on a CPU, for a row of a mask (..., C) without any class."""
    if values_on_cpu(mask) and not bool(mask.any(-1).all()):
        raise ValueError(
            "mask must be True for at least one class of each row, got a row where it is False "
            "for all of them; ignore such rows by ignore_index"
        )
