"""What a loss is: a frozen value with a scalar function of (s, q, c), or one on logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softsphere.stats import Partials, Stats

__all__ = ["Loss", "Normalised", "OnLogits", "Spherical"]


@dataclass(frozen=True)
class Loss:
    """A loss of one row of outputs and its target. Class attributes declare its properties.

    normalised: it is −log f_t of a distribution f, so it has a likelihood.
    shift_invariant, scale_invariant: o + a, or a·o with a > 0, give the same loss.
    upper_bound: with π = 1 it is never below log-softmax.
    smoothable: (1−α)·ℓ(t) + (α/C)·Σ_k ℓ(k) is a loss for a smoothed target.
    """

    normalised: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    scale_invariant: ClassVar[bool] = False
    upper_bound: ClassVar[bool] = False
    smoothable: ClassVar[bool] = True

    def log_numerator(self, o: Tensor) -> Tensor:
        """log t(o), elementwise, where f_k = π_k t(o_k) / Σ_j π_j t(o_j)."""
        raise TypeError(
            f"{type(self).__name__} is not a normalised distribution, so it has no probabilities; "
            "rank classes by their outputs instead"
        )


class Spherical(Loss, ABC):
    """A loss ℓ(s, q, c): value and closed-form partials, and nothing of where they came from."""

    @abstractmethod
    def each(self, x: Stats) -> Tensor:
        """The loss of every target taken alone with value 1: (..., K)."""

    def value(self, x: Stats) -> Tensor:
        """The loss of each row, Σ_j y_j ℓ(s, q, c_j): (...)."""
        each = self.each(x)
        return (each if x.y is None else x.y * each).sum(-1)

    @abstractmethod
    def partials(self, x: Stats) -> Partials:
        """∂value/∂(s, q, c), in closed form."""


class Normalised(Spherical):
    """−log f_t with f_k = π_k t(o_k) / N, whose normaliser N(s, q, M) needs no outputs."""

    normalised: ClassVar[bool] = True

    @abstractmethod
    def log_normaliser(self, s: Tensor, q: Tensor, mass: float) -> Tensor:
        """log N = log Σ_k π_k t(o_k)."""

    @abstractmethod
    def normaliser_partials(self, s: Tensor, q: Tensor, mass: float) -> tuple[Tensor, Tensor]:
        """∂log N/∂s and ∂log N/∂q."""

    @abstractmethod
    def score(self, o: Tensor) -> Tensor:
        """d log t(o)/do, elementwise."""

    def each(self, x: Stats) -> Tensor:
        nll = self.log_normaliser(x.s, x.q, x.mass).unsqueeze(-1) - self.log_numerator(x.c)
        return nll if x.pi is None else nll - x.pi.log()

    def partials(self, x: Stats) -> Partials:
        ds, dq = self.normaliser_partials(x.s, x.q, x.mass)
        return weigh(x, ds.unsqueeze(-1), dq.unsqueeze(-1), -self.score(x.c))


class OnLogits(Loss, ABC):
    """A comparator that is not spherical: it needs all the outputs, (..., C), in memory."""

    @abstractmethod
    def per_class(self, o: Tensor, pi: Tensor | None) -> Tensor:
        """ℓ_k for every class k taken as the target: (..., C)."""

    def at(self, o: Tensor, target: Tensor, pi: Tensor | None) -> Tensor:
        """ℓ_t for one target a row: target (...) → (...)."""
        return self.per_class(o, pi).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def weigh(x: Stats, s: Tensor, q: Tensor, c: Tensor) -> Partials:
    """Partials of Σ_j y_j ℓ_j from those of each ℓ_j; s and q may have one column for all j."""
    y = torch.ones_like(x.c) if x.y is None else x.y
    return Partials((y * s).sum(-1), (y * q).sum(-1), y * c)
