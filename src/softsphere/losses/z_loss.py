"""The Z-loss: a softplus of the standardised target output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from softsphere import checks
from softsphere.losses.base import Spherical
from softsphere.rounding import is_rounding
from softsphere.stats import Stats

__all__ = ["ZLoss"]


@dataclass(frozen=True)
class ZLoss(Spherical):
    r"""ℓ = softplus(a(b − z))/a,  z = (c − μ)/σ,  μ = s/M,  σ² = q/M − μ².

    It is invariant to a shift and a positive scale of the outputs. It is not a distribution, so
    only ranking metrics apply. It is not the penalty log²Z on the normaliser of softmax that the
    code of large models calls "z-loss".

    Args:
        a, b: the steepness of the softplus, and the z at which it bends.

    Partials, with g = −sigmoid(a(b − z)): c' = g/σ, q' = −g z/(2Mσ²),
    s' = g(−1/(Mσ) + zμ/(Mσ²)).
    Use it to rank, where no probabilities are needed and a and b can be tuned: it does not see
    the scale of the outputs, so that no output has to grow to win.
    Convention: where all outputs are equal (σ = 0, up to rounding), z and its gradient are 0.
    Where σ² overflows, z is NaN. The gradient passes through 1/σ³ and 1/σ², which float32 can hold
    for σ from 1e-12 to 1e13; use float64 beyond.
    Raises ValueError unless a > 0 and both are finite.
    Source: de Brébisson & Vincent 2016, arXiv:1604.08859, eq. (4).

    >>> import torch
    >>> from softsphere.stats import Stats
    >>> o = torch.tensor([1.0, 0.0, -1.0])
    >>> ZLoss(a=1.0, b=1.0).value(Stats(o.sum(), (o * o).sum(), o[:1], mass=3.0))
    tensor(0.5871)
    """

    a: float = 1.0
    b: float = 4.0

    shift_invariant: ClassVar[bool] = True
    scale_invariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.positive("a", self.a)
        checks.finite("b", self.b)

    @property
    def smoothable(self) -> bool:
        return False

    def standardised(self, x: Stats) -> Tensor:
        """Returns z (…, K) of the statistics x. It is zero where σ is."""
        mu = (x.s / x.mass).unsqueeze(-1)
        variance = (x.q / x.mass).unsqueeze(-1) - mu * mu
        terms = x.mass.unsqueeze(-1) if isinstance(x.mass, Tensor) else x.mass
        equal = is_rounding(variance, mu, terms)
        rsigma = torch.where(equal, 0.0, torch.where(equal, 1.0, variance).rsqrt())
        # 1/σ would be 0 after an overflow, and the loss that of equal outputs.
        rsigma = torch.where(variance.isinf(), torch.nan, rsigma)
        return (x.c - mu) * rsigma

    def each(self, x: Stats) -> Tensor:
        return softplus(self.a * (self.b - self.standardised(x))) / self.a
