"""The conventions of a loss: class weights, base measure, ignored rows, smoothing, reduction.

They are those of `F.cross_entropy`, with a base measure added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere.targets import Targets, from_indices, from_sparse

__all__ = ["Conventions", "mixed_precision", "multiplied_dtype"]

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False)
class Conventions:
    """How the losses of the rows are defined and reduced. `checked` makes one from arguments.

    weight: (C) class weights, or None.
    pi: (C) base measure, normalised to Σ π = C, or None for π = 1.
    reduction: "mean", "sum" or "none".
    ignore_index: rows with this target have no loss; None if every row has one.
    label_smoothing: α in (1−α)·ℓ(t) + (α/C)·Σ_k ℓ(k).
    mask: True for classes that take part, not checked yet; None if all do.
    """

    weight: Tensor | None = None
    pi: Tensor | None = None
    reduction: str = "mean"
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    mask: Any = None

    @classmethod
    def checked(
        cls,
        loss: losses.Loss,
        *,
        weight: Tensor | None = None,
        pi: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: Any = -100,
        label_smoothing: Any = 0.0,
        mask: Any = None,
    ) -> Conventions:
        """Conventions that `loss` can follow; `pi` is normalised already.

        Raises ValueError or TypeError for a value that is wrong for every input.
        """
        checks.one_of("reduction", reduction, REDUCTIONS)
        ignore_index = checks.ignore_index(ignore_index)
        label_smoothing = checks.label_smoothing(label_smoothing)
        if label_smoothing and not loss.smoothable:
            raise ValueError(
                f"label_smoothing has no meaning for {loss}, which tells targets from all other "
                "classes; leave it 0"
            )
        if weight is not None:
            checks.class_weights(weight)
        checks.without_gradient("prior", pi)
        return cls(weight, pi, reduction, ignore_index, label_smoothing, mask)

    def masked(self, mask: Any) -> Conventions:
        """The same for the classes where `mask` is True."""
        # not dataclasses.replace, which the compiler of torch 2.6 cannot trace
        rest = self.reduction, self.ignore_index, self.label_smoothing, mask
        return Conventions(self.weight, self.pi, *rest)

    def fit(self, num_classes: int, dtype: torch.dtype, input: Tensor) -> Conventions:
        """The same with vectors in `dtype`, for an input of `num_classes` classes.

        Raises ValueError or TypeError if they do not have one entry per class, or are on another
        device than the input, and on a CPU if the prior is not normalised.
        """
        for name, vector in (("weight", self.weight), ("prior", self.pi)):
            if vector is not None:
                checks.class_vector(name, vector, num_classes)
                checks.same_device(name, vector, "input", input)
        if self.pi is not None:
            checks.normalised_prior(self.pi)
        w = None if self.weight is None else self.weight.to(dtype)
        pi = None if self.pi is None else checks.narrowed_prior(self.pi, dtype)
        rest = self.reduction, self.ignore_index, self.label_smoothing, self.mask
        return Conventions(w, pi, *rest)

    def entries(
        self, target: Tensor, values: Tensor | None, num_classes: int, dtype: torch.dtype
    ) -> Targets:
        """Class indices (...), or K-sparse targets (..., K) with values, as entries."""
        if values is None:
            return from_indices(target, num_classes, self.ignore_index, self.weight, dtype)
        values = values.to(dtype)
        return from_sparse(target, values, num_classes, self.ignore_index, self.weight)

    def reduce(self, rows: Tensor, counted: Tensor | None) -> Tensor:
        """The losses of the rows, reduced; `counted` has their shares in the mean (None: one)."""
        if self.reduction == "none":
            return rows
        if self.reduction == "sum":
            return rows.sum()
        return rows.mean() if counted is None else rows.sum() / counted.sum()

    def finish(self, rows: Tensor, counted: Tensor | None, given: Tensor) -> Tensor:
        """`reduce`, in the dtype of the given tensor; under autocast in the dtype of the rows."""
        result = self.reduce(rows, counted)
        return result if mixed_precision(given) else result.to(given.dtype)

    def refuse_weight(self) -> None:
        """Raises ValueError if there are class weights, for the squared error of a vector."""
        if self.weight is not None:
            raise ValueError(
                "weight has no meaning for the squared error of a target vector; "
                "weigh its classes with prior"
            )


def mixed_precision(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    device = x.device.type
    # The compiler of torch 2.11 cannot trace the first question. It compiles for no other device.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def multiplied_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` multiplies x, which autocast may change."""
    if x.dtype == torch.float64 or not mixed_precision(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
