"""Softmax and Taylor softmax of higher order, with or without a soft margin, for comparison."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from softsphere import checks
from softsphere.losses.base import OnLogits

__all__ = ["HigherTaylorSoftmax", "SoftMarginSoftmax", "Softmax"]


class _NormalisedOnLogits(OnLogits):
    """−log f_t with f_k = π_k t(o_k) / Σ_j π_j t(o_j), computed from all the outputs."""

    normalised: ClassVar[bool] = True

    @abstractmethod
    def log_numerator(self, o: Tensor) -> Tensor: ...

    def per_class(self, o: Tensor, pi: Tensor | None) -> Tensor:
        log_t = self.log_numerator(o)
        log_t = log_t if pi is None else log_t + pi.log()
        return -torch.log_softmax(log_t, -1)


@dataclass(frozen=True)
class Softmax(_NormalisedOnLogits):
    """ℓ = log Σ_k π_k e^{o_k} − log π_t − o_t.

    The reference for all others. It is not spherical, so it needs all the outputs.

    Partials: ∂ℓ/∂o_k = p_k − [k = t], with p_k = π_k e^{o_k} / Σ_j π_j e^{o_j}.
    Domain: outputs below +∞; −∞ leaves a class out.
    Use it where its cost is no concern, or as what other losses are compared with.
    Source: Bridle 1990, "Probabilistic interpretation of feedforward classification network
    outputs".

    >>> import torch
    >>> Softmax().at(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]), None)
    tensor([0.4076])
    """

    shift_invariant: ClassVar[bool] = True
    upper_bound: ClassVar[bool] = True

    def log_numerator(self, o: Tensor) -> Tensor:
        return o


@dataclass(frozen=True)
class HigherTaylorSoftmax(_NormalisedOnLogits):
    r"""ℓ = log Σ_k π_k t(o_k) − log π_t − log t(o_t),  t(o) = Σ_{i≤n} oⁱ/i!.

    Taylor softmax of even order n: the Taylor polynomial t takes the place of the exponential. t is
    positive everywhere, with minima ½ (n = 2), 0.2704 (4) and 0.1493 (6). For |o| > 1 it is
    computed as n log|o| + log(t(o)/|o|ⁿ), so that no power overflows, and in float64, since the
    terms of a negative o cancel. A class at about the smallest number of the dtype, as softmax is
    given for a masked class, has t = ∞, so that the loss is not finite.

    Args:
        order: n, even and from 2 to 20.

    Partials: ∂ℓ/∂o_k = (p_k − [k = t]) t'(o_k)/t(o_k), with p_k = π_k t(o_k) / Σ_j π_j t(o_j).
    Use it to see what lies between log-Taylor softmax and softmax. It needs the outputs, so it
    saves nothing with many classes.
    Raises TypeError or ValueError for any other order.
    Source: Banerjee et al. 2020, arXiv:2011.11538, eq. (7).

    >>> import torch
    >>> HigherTaylorSoftmax(4).at(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]), None)
    tensor([0.4106])
    """

    order: int = 4

    def __post_init__(self) -> None:
        checks.even_order(self.order)

    def log_numerator(self, o: Tensor) -> Tensor:
        n, dtype = self.order, o.dtype
        o = o.double()
        far = o.abs() > 1
        near = torch.where(far, 0.0, o)
        inverse = 1 / torch.where(far, o, 1.0)
        ascending = [1 / math.factorial(i) for i in range(n + 1)]
        log_near = torch.log1p(near * _horner(near, ascending[1:]))
        log_far = torch.log(_horner(inverse, ascending[::-1])) - n * inverse.abs().log()
        log_far = torch.where(o <= torch.finfo(dtype).min / 2, torch.inf, log_far)
        return torch.where(far, log_far, log_near).to(dtype)


@dataclass(frozen=True)
class SoftMarginSoftmax(OnLogits):
    r"""ℓ = log(π_t t(o_t − m) + Σ_{j≠t} π_j t(o_j)) − log π_t − log t(o_t − m).

    Here t is the exponential, or the Taylor polynomial of an even order n. The target must win by a
    margin m ≥ 0. With m = 0 it is softmax itself, or Taylor softmax of order n. The margin is used
    in training alone: probabilities are those of m = 0.

    Args:
        margin: m.
        order: n, even and from 2 to 20; None for softmax.

    Partials: ∂ℓ/∂o_k = (p_k − [k = t]) t'(a_k)/t(a_k), with a_k = o_k − m [k = t] and
    p_k = π_k t(a_k) / Σ_j π_j t(a_j).
    Use it with few classes, where a margin between them is wanted and m can be tuned.
    Raises ValueError or TypeError unless m ≥ 0 and n is such a number or None.
    Source: Banerjee et al. 2020, arXiv:2011.11538, eqs. (9) and (11).

    >>> import torch
    >>> SoftMarginSoftmax(1.0).at(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]), None)
    tensor([0.8620])
    """

    margin: float = 1.0
    order: int | None = None

    normalised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.non_negative("margin", self.margin)
        if self.order is not None:
            checks.even_order(self.order)

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.order is None

    @property
    def upper_bound(self) -> bool:  # type: ignore[override]
        return self.order is None

    @property
    def plain(self) -> _NormalisedOnLogits:
        """The loss without a margin."""
        return Softmax() if self.order is None else HigherTaylorSoftmax(self.order)

    def log_numerator(self, o: Tensor) -> Tensor:
        return self.plain.log_numerator(o)

    def at(self, o: Tensor, target: Tensor, pi: Tensor | None) -> Tensor:
        # Not one_hot, which looks at its values: that fails inside vmap.
        chosen = torch.arange(o.shape[-1], device=o.device) == target.unsqueeze(-1)
        return self.plain.at(torch.where(chosen, o - self.margin, o), target, pi)

    def per_class(self, o: Tensor, pi: Tensor | None) -> Tensor:
        log_t, log_m = self.log_numerator(o), self.log_numerator(o - self.margin)
        if pi is not None:
            log_t, log_m = log_t + pi.log(), log_m + pi.log()
        return torch.nn.functional.softplus(_log_rest(log_t) - log_m)


def _log_rest(log_t: Tensor) -> Tensor:
    """log Σ_{j≠k} t_j for every k: (..., C). For the largest k the others are summed again."""
    best = log_t.argmax(-1, keepdim=True)
    is_best = torch.arange(log_t.shape[-1], device=log_t.device) == best
    nothing = torch.finfo(log_t.dtype).min
    others = torch.logsumexp(log_t.masked_fill(is_best, nothing), -1, keepdim=True)
    log_n = torch.logsumexp(log_t, -1, keepdim=True)
    share = (log_t - log_n).masked_fill(is_best, -1.0)
    return torch.where(is_best, others, log_n + torch.log1p(-share.exp()))


def _horner(x: Tensor, coefficients: list[float]) -> Tensor:
    """Σ_i coefficients[i] xⁱ."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
