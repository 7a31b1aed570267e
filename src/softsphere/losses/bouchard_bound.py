"""Bouchard's product-of-sigmoids bound of log-softmax, made spherical by one ξ for all classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from softsphere._torch import values_on_cpu
from softsphere.losses.base import Spherical, less_log_prior
from softsphere.stats import Stats

__all__ = ["BouchardBound"]

# The number of safeguarded Newton steps. The tests measure the residual h(ξ) − v after them.
STEPS = 16


@dataclass(frozen=True)
class BouchardBound(Spherical):
    r"""ℓ = min_ξ s/M + λ(q − s²/M) − (M−2)²/(16Mλ) − Mξ/2 − Mλξ² + M log(1 + e^ξ) − c.

    Here λ = λ(ξ) = (σ(ξ) − ½)/(2ξ), and the minimum is over all of ℓ. With v = q/M − s²/M² the best
    ξ solves ξ² = v + ((M−2)/(4Mλ))²; it is log(M − 1) at v = 0. The loss is an upper bound of −log
    softmax, and very loose for many classes. With a base measure −log π_t is added, and it is no
    longer a bound if some π_k < 1.

    Use it to compare with softmax, with few classes. For large outputs it is tighter than Böhning's
    bound.

    Partials (envelope theorem): s' = 1/M − 2λs/M, q' = λ, c' = −1.
    Raises ValueError for fewer than two classes, where the bound has no minimum.
    Source: Bouchard 2007 (Efficient bounds for the softmax function); arXiv:1511.05042.

    >>> import torch
    >>> from softsphere.stats import Stats
    >>> o = torch.zeros(2)
    >>> BouchardBound().value(Stats(o.sum(), (o * o).sum(), o[:1], mass=2.0)).exp()
    tensor(4.)
    """

    shift_invariant: ClassVar[bool] = True
    upper_bound: ClassVar[bool] = True

    def each(self, x: Stats) -> Tensor:
        mu = x.s / x.mass
        centred = (x.q - x.s * mu).clamp_min(0)
        xi = best_xi(centred / x.mass, x.mass)
        # The formula's terms are of size Mξ and cancel to ξ: E = e^{−ξ} is of size 1/M.
        E, rho = torch.exp(-xi), (x.mass - 1) / x.mass**2
        slack = xi * x.mass * (rho - (E / (1 + E)) ** 2) / torch.tanh(xi / 2)
        bound = mu + _lambda(xi) * centred + slack + x.mass * torch.log1p(E)
        return less_log_prior(bound.unsqueeze(-1) - x.c, x)


def _lambda(xi: Tensor) -> Tensor:
    """λ(ξ) = (σ(ξ) − ½)/(2ξ) = tanh(ξ/2)/(4ξ), ξ > 0."""
    return torch.tanh(xi / 2) / (4 * xi)


def best_xi(v: Tensor, mass: float | Tensor) -> Tensor:
    """The ξ of the tightest bound, where h(ξ) = 4ξ² (ρ(1+E)² − E)/(1−E)² equals v.

    E = e^{−ξ}, ρ = (M−1)/M². h rises from 0 at ξ₀ = log(M−1) and lies below 4ρξ², so the
    solution is between max(ξ₀, a) and ξ₀ + a, a = √(v/4ρ). For M = 2 it is √v.
    """
    if isinstance(mass, Tensor):
        if values_on_cpu(mass) and bool((mass < 2).any()):
            _refuse_mass(float(mass.min()))
        two = mass == 2
        safe = torch.where(two, 3.0, mass)
        return torch.where(two, _root(v), _newton_xi(v, (safe - 1) / safe**2, (safe - 1).log()))
    if mass < 2:
        _refuse_mass(mass)
    return _root(v) if mass == 2 else _newton_xi(v, (mass - 1) / mass**2, math.log(mass - 1))


def _refuse_mass(mass: float) -> NoReturn:
    raise ValueError(f"BouchardBound needs at least 2 classes, got {mass:g}")


def _root(v: Tensor) -> Tensor:
    """√v, kept away from ξ = 0, near which λ is 1/8 to rounding."""
    return v.clamp_min(1e-8).sqrt()


def _newton_xi(v: Tensor, rho: float | Tensor, xi0: Any) -> Tensor:
    def newton(xi: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        E = torch.exp(-xi)
        g = (rho * (1 + E) ** 2 - E) / (1 - E) ** 2
        h = 4 * xi * xi * g
        dg = (1 - 4 * rho) * E * (1 + E) / (1 - E) ** 3
        return h - v, xi - (h - v) / (8 * xi * g + 4 * xi * xi * dg)

    with torch.no_grad():
        a = (v / (4 * rho)).sqrt()
        low, high = a.clamp_min(xi0), a + xi0
        xi = high
        for _ in range(STEPS):
            error, proposal = newton(xi, v)
            low, high = torch.where(error < 0, xi, low), torch.where(error < 0, high, xi)
            inside = (proposal >= low) & (proposal <= high)
            xi = torch.where(inside, proposal, 0.5 * (low + high))
    # One step in the graph gives ξ its exact first derivative, hence ℓ its second.
    return newton(xi, v)[1].clamp_min(xi0)
