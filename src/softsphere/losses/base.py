"""A loss is a frozen value with a scalar function of (s, q, c), or of all the outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from softsphere.stats import Stats

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
        """log t(o), elementwise, where f_k = π_k t(o_k) / Σ_j π_j t(o_j).

        Raises TypeError for a loss that is not a distribution.
        """
        raise TypeError(
            f"{type(self).__name__} is not a normalised distribution, so it has no probabilities; "
            "rank classes by their outputs instead"
        )


class Spherical(Loss, ABC):
    """A loss ℓ(s, q, c). It does not know how the statistics were computed."""

    @abstractmethod
    def each(self, x: Stats) -> Tensor:
        """The loss of every target taken alone with value 1: (..., K)."""

    def value(self, x: Stats) -> Tensor:
        """The loss of each row, Σ_j y_j ℓ(s, q, c_j): (...)."""
        each = self.each(x)
        return (each if x.y is None else x.y * each).sum(-1)


class Normalised(Spherical):
    """−log f_t with f_k = π_k t(o_k) / N. The normaliser N(s, q, M) needs no outputs."""

    normalised: ClassVar[bool] = True

    @abstractmethod
    def log_normaliser(self, s: Tensor, q: Tensor, mass: float | Tensor) -> Tensor:
        """log N = log Σ_k π_k t(o_k)."""

    def each(self, x: Stats) -> Tensor:
        log_n = self.log_normaliser(x.s, x.q, x.mass).unsqueeze(-1)
        return less_log_prior(log_n - self.log_numerator(x.c), x)


class OnLogits(Loss, ABC):
    """A comparator that is not spherical: it needs all the outputs (..., C) in memory.

    π is None, or (C), or (..., C); a class with π_k = 0 does not take part.
    """

    @abstractmethod
    def per_class(self, o: Tensor, pi: Tensor | None) -> Tensor:
        """ℓ_k for every class k taken as the target: (..., C)."""

    def at(self, o: Tensor, target: Tensor, pi: Tensor | None) -> Tensor:
        """ℓ_t for one target in each row: target (...) → (...)."""
        return self.per_class(o, pi).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def less_log_prior(nll: Tensor, x: Stats) -> Tensor:
    """nll − log π_t of every target: (..., K)."""
    return nll if x.pi is None else nll - x.pi.log()
