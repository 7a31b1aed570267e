"""A loss is a frozen value with a scalar function of (s, q, c), or of all the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from softsphere.stats import Stats, over_targets

__all__ = ["Loss", "Normalised", "OnLogits", "Spherical", "less_log_prior"]


@dataclass(frozen=True)
class Loss:
    """A loss of one row of outputs and its target. Class attributes declare its properties.

    Attributes:
        normalised: whether it is −log f_t of a distribution f, and so has a likelihood.
        shift_invariant: whether o + a has the same loss for every number a.
        scale_invariant: whether a·o has the same loss for every a > 0.
        upper_bound: whether it is never below −log softmax if π = 1.
    """

    normalised: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    scale_invariant: ClassVar[bool] = False
    upper_bound: ClassVar[bool] = False

    @property
    def plain(self) -> Loss:
        """The loss outside training: this one, unless it has a part for training alone."""
        return self

    @property
    def smoothable(self) -> bool:
        """Whether label smoothing, (1−α)·ℓ(t) + (α/C)·Σ_k ℓ(k), has a meaning for this loss."""
        return True

    def log_numerator(self, o: Tensor) -> Tensor:
        """Returns log t(o) of each output, where f_k = π_k t(o_k) / Σ_j π_j t(o_j).

        Args:
            o: outputs of any shape.

        Raises TypeError for a loss that is not a distribution.
        """
        raise TypeError(
            f"{type(self).__name__} is not a normalised distribution, so it has no probabilities; "
            "rank classes by their outputs instead"
        )


class Spherical(Loss, ABC):
    """A loss ℓ(s, q, c). It does not know how the statistics were computed.

    A subclass defines `each`. It then works on logits, on every output layer and in every engine.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> from softsphere import SphericalLoss
    >>> @dataclass(frozen=True)
    ... class HalfSquare(Spherical):
    ...     def each(self, x):
    ...         return 0.5 * x.q.unsqueeze(-1) - x.c
    >>> SphericalLoss(HalfSquare())(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    tensor(0.5000)
    """

    @abstractmethod
    def each(self, x: Stats) -> Tensor:
        """Returns the loss of every target, as if it were the only one and had the value 1.

        Args:
            x: the statistics of rows (…) with K targets each.

        Returns (…, K).
        """

    def value(self, x: Stats) -> Tensor:
        """Returns the loss of each row, Σ_j y_j ℓ(s, q, c_j).

        Args:
            x: the statistics of rows (…) with K targets each; without values all y_j are 1.

        Returns (…).
        """
        each = self.each(x)
        return over_targets(each if x.y is None else x.y * each)


class Normalised(Spherical):
    """A spherical loss that is −log f_t of a distribution f_k = π_k t(o_k) / N.

    A subclass defines t by `log_numerator` and N by `log_normaliser`, which needs no outputs.
    """

    normalised: ClassVar[bool] = True

    @abstractmethod
    def log_normaliser(self, s: Tensor, q: Tensor, mass: float | Tensor) -> Tensor:
        """Returns log N = log Σ_k π_k t(o_k).

        Args:
            s, q: the statistics of rows (…).
            mass: M = Σ π_k, a number or (…).

        Returns (…).
        """

    def each(self, x: Stats) -> Tensor:
        log_n = self.log_normaliser(x.s, x.q, x.mass).unsqueeze(-1)
        return less_log_prior(log_n - self.log_numerator(x.c), x)


class OnLogits(Loss, ABC):
    """A comparator that is not spherical: it needs all the outputs in memory.

    A subclass defines `per_class`.
    """

    @abstractmethod
    def per_class(self, o: Tensor, pi: Tensor | None) -> Tensor:
        """Returns the loss ℓ_k of every class k, as if it were the target.

        Args:
            o: (…, C), the outputs.
            pi: (C) or (…, C), the base measure π, or None for π = 1. A class with π_k = 0 does not
                take part.

        Returns (…, C).
        """

    def at(self, o: Tensor, target: Tensor, pi: Tensor | None) -> Tensor:
        """Returns the loss of one target in each row.

        Args:
            o, pi: as in `per_class`.
            target: (…), int64.

        Returns (…).
        """
        return self.per_class(o, pi).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def less_log_prior(nll: Tensor, x: Stats) -> Tensor:
    """nll − log π_t of every target: (..., K)."""
    return nll if x.pi is None else nll - x.pi.log()
