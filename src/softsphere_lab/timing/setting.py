"""How large a timed problem is, and the random rows that it is timed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """The number of classes D, the width d, and the number of rows m of a step."""

    D: int
    d: int
    m: int

    def __str__(self) -> str:
        """
        >>> str(Setting(D=10_000, d=128, m=64))
        'D = 10,000, d = 128, m = 64'
        """
        return f"D = {self.D:,}, d = {self.d}, m = {self.m}"

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns normal hidden rows (m, d) and targets (m), on the device of the generator.

        Targets are distributed as words are: P(t < k) is proportional to log(k + 1).
        """
        device = generator.device
        hidden = torch.randn(self.m, self.d, generator=generator, device=device).requires_grad_()
        uniform = torch.rand(self.m, generator=generator, device=device)
        target = (torch.exp(uniform * math.log(self.D + 1)).long() - 1).clamp_(0, self.D - 1)
        return hidden, target
