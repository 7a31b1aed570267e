"""Squared error with sparse targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.losses.base import Spherical
from softsphere.stats import Stats

__all__ = ["SquaredError"]


@dataclass(frozen=True)
class SquaredError(Spherical):
    r"""ℓ = Σ_k π_k (o_k − y_k)² = q − 2 Σ_j π_j c_j y_j + Σ_j π_j y_j².

    The target vector y is zero except at K places. A class index means y = 1 there; target values
    y may be any real numbers. The loss is a sum over classes, not a mean.

    Partials: s' = 0, q' = 1, c'_j = −2 π_j y_j.
    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091, eq. (1).

    >>> import torch
    >>> from softsphere.stats import Stats
    >>> o = torch.tensor([1.0, 0.0, -1.0])
    >>> SquaredError().value(Stats(o.sum(), (o * o).sum(), o[:1], mass=3.0))
    tensor(1.)
    """

    def each(self, x: Stats) -> Tensor:
        one = 1 - 2 * x.c
        return x.q.unsqueeze(-1) + (one if x.pi is None else x.pi * one)

    def value(self, x: Stats) -> Tensor:
        if x.y is None and x.c.shape[-1] == 1:
            return self.each(x).squeeze(-1)
        y = torch.ones_like(x.c) if x.y is None else x.y
        cross = y * (y - 2 * x.c)
        return x.q + (cross if x.pi is None else x.pi * cross).sum(-1)
