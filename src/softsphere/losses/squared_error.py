"""Squared error with sparse targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere import checks
from softsphere.losses.base import Spherical
from softsphere.stats import Stats

__all__ = ["SquaredError"]


@dataclass(frozen=True)
class SquaredError(Spherical):
    r"""ℓ = Σ_k w_k π_k (o_k − y_k)², w_k = 1 where y_k ≠ 0 and α elsewhere.

    From the statistics it is α q + Σ_j π_j ((1 − α) c_j² − 2 c_j y_j + y_j²). The target vector y
    is zero except at K places. A class index means y = 1 there; target values y may be any real
    numbers. The loss is a sum over classes, not a mean.

    A class is observed where y ≠ 0. With implicit feedback, such as the places that a user has
    visited, most of the other classes are unknown rather than wrong. α < 1 gives them less weight;
    otherwise thousands of zeros outweigh the few ones. Label smoothing would give every class a
    target value, so it is defined for α = 1 alone.

    From the statistics the value is a difference of numbers of the size of q + Σ_j y_j², with an
    error of some eps of that. In float32 it has lost its digits where the outputs meet all targets
    to a hundredth or so, and derivatives lose theirs later. The losses on logits sum the squares
    themselves where there are target values. Elsewhere the digits are looked at on a CPU, outside
    of compiled code and torch.func.vmap. Losses on logits, and linear layers with engine "auto" or
    "dense", then compute in float64; `accumulate()` with engine "auto" raises RuntimeError, and
    other engines and factored layers warn. Ask for float64 where nothing is looked at, by
    `LinearSphericalOptions(accumulate_dtype=torch.float64)` or a factored layer of that dtype.

    Args:
        unobserved: α, the weight of the classes with y = 0.

    Partials: s' = 0, q' = α, c'_j = 2 π_j ((1 − α) c_j − y_j).
    Use it for targets that are real numbers, for several targets in a row, and for implicit
    feedback. With one target among many classes it ranks them, without probabilities.
    Raises ValueError unless 0 < α ≤ 1.
    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091, eq. (1), for α = 1; Hu, Koren
    & Volinsky 2008, "Collaborative filtering for implicit feedback datasets", eq. (3), and Chen et
    al. 2020, "Efficient neural matrix factorization without sampling for recommendation", for α.

    >>> import torch
    >>> from softsphere.stats import Stats
    >>> o = torch.tensor([1.0, 0.0, -1.0])
    >>> x = Stats(o.sum(), (o * o).sum(), o[:1], mass=3.0)
    >>> SquaredError().value(x)
    tensor(1.)
    >>> SquaredError(unobserved=0.25).value(x)
    tensor(0.2500)
    """

    unobserved: float = 1.0

    def __post_init__(self) -> None:
        checks.positive("unobserved", self.unobserved)
        if self.unobserved > 1:
            raise ValueError(
                f"unobserved must be at most 1, the weight of an observed class, got "
                f"{self.unobserved}"
            )

    @property
    def smoothable(self) -> bool:
        """Only for α = 1, since smoothing gives every class a target value."""
        return self.unobserved == 1

    def each(self, x: Stats) -> Tensor:
        own = self._at_targets(x.c, torch.ones_like(x.c))
        return self.unobserved * x.q.unsqueeze(-1) + (own if x.pi is None else x.pi * own)

    def value(self, x: Stats) -> Tensor:
        if x.y is None and x.c.shape[-1] == 1:
            return self.each(x).squeeze(-1)
        own = self._at_targets(x.c, torch.ones_like(x.c) if x.y is None else x.y)
        return self.unobserved * x.q + (own if x.pi is None else x.pi * own).sum(-1)

    def of_vector(self, o: Tensor, y: Tensor, pi: Tensor | None) -> Tensor:
        """The loss (...) of outputs o (..., D) and target vectors y (..., D), from its squares."""
        squares = (o - y).square()
        if self.unobserved != 1:
            squares = torch.where(y == 0, self.unobserved * squares, squares)
        return (squares if pi is None else pi * squares).sum(-1)

    def lost_digits(self, x: Stats, value: Tensor, error: float) -> Tensor:
        """Whether rounding may have changed the value of some row by a hundredth: a boolean ().

        error: that of q in eps.
        """
        y = torch.ones_like(x.c) if x.y is None else x.y
        size = x.q + (y * y if x.pi is None else x.pi * y * y).sum(-1)
        return (error * torch.finfo(size.dtype).eps * size > 1e-2 * value).any()

    def _at_targets(self, c: Tensor, y: Tensor) -> Tensor:
        """(c − y)² − α c², or 0 where y = 0."""
        known = y * (y - 2 * c)
        if self.unobserved == 1:
            return known
        return known + torch.where(y == 0, 0.0, (1 - self.unobserved) * c * c)
