"""Log-Taylor softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.losses.base import Normalised

__all__ = ["TaylorSoftmax"]


@dataclass(frozen=True)
class TaylorSoftmax(Normalised):
    r"""ℓ = log(M + s + q/2) − log π_t − log(1 + c + c²/2).

    The exponential of softmax is replaced by its Taylor polynomial of order two. The numerator
    t(o) = ½ + ½(1 + o)² is at least ½ (at o = −1), so nothing divides by zero and there is no ε.
    It is not monotone: t(−2) = t(0). It is the spherical softmax with ε = 1 of 1 + o.

    Partials: s' = 1/N, q' = 1/(2N), c' = −(1 + c)/t(c), with N = M + s + q/2.
    Domain: all real outputs, as long as q is finite.
    Use it as the first choice of the family: it is a distribution, it has no number to tune, and
    it is the default of the output layers. With thousands of classes or more, pass a prior.
    Source: de Brébisson & Vincent 2015, arXiv:1511.05042, §3.2.

    >>> import torch
    >>> from softsphere.stats import Stats
    >>> o = torch.tensor([1.0, 0.0, -1.0])
    >>> TaylorSoftmax().value(Stats(o.sum(), (o * o).sum(), o[:1], mass=3.0))
    tensor(0.4700)
    """

    def log_numerator(self, o: Tensor) -> Tensor:
        # log1p of t − 1 keeps small outputs exact.
        return torch.log1p(o * (1 + 0.5 * o))

    def log_normaliser(self, s: Tensor, q: Tensor, mass: float | Tensor) -> Tensor:
        return torch.log(mass + torch.add(s, q, alpha=0.5))
