"""Log-spherical softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere import checks
from softsphere.losses.base import Normalised

__all__ = ["SphericalSoftmax"]


@dataclass(frozen=True)
class SphericalSoftmax(Normalised):
    r"""ℓ = log(q + Mε) − log π_t − log(c² + ε).

    It is even in o: only the size of an output matters. ε > 0 is a hyper-parameter. The pull on
    the target, 2c/(c² + ε), has its maximum 1/√ε at c = √ε and is zero at c = 0.

    Args:
        eps: ε.

    Partials: s' = 0, q' = 1/(q + Mε), c' = −2c/(c² + ε).
    Use it where the sign of an output should not matter and ε can be tuned. Log-Taylor softmax,
    which has no ε, is the simpler choice.
    Raises ValueError unless ε > 0 and finite.
    Source: de Brébisson & Vincent 2015, arXiv:1511.05042, §3.1.

    >>> import torch
    >>> from softsphere.stats import Stats
    >>> o = torch.tensor([1.0, 0.0, -1.0])
    >>> SphericalSoftmax(eps=0.5).value(Stats(o.sum(), (o * o).sum(), o[:1], mass=3.0))
    tensor(0.8473)
    """

    eps: float = 1.0

    def __post_init__(self) -> None:
        checks.positive("eps", self.eps)

    def log_numerator(self, o: Tensor) -> Tensor:
        return torch.log(o * o + self.eps)

    def log_normaliser(self, s: Tensor, q: Tensor, mass: float | Tensor) -> Tensor:
        return torch.log(q + mass * self.eps)
