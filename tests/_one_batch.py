"""A small factored layer with a bias, and one fixed batch for it."""

from __future__ import annotations

import torch

from softsphere import FactoredSphericalLoss
from softsphere.optim import FactoredSGD

d, D, m = 5, 23, 6
rows = torch.randn(m, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
target = torch.randint(D // 2, (m,), generator=torch.Generator().manual_seed(1))


def layer(**options):
    torch.manual_seed(0)
    return FactoredSphericalLoss(d, D, dtype=torch.float64, **options)


def backward(head, scale=1.0):
    head.zero_grad()
    (head(rows.to(head.weight.dtype), target) * scale).backward()


def with_momentum(head, steps=3, **options):
    optimizer = FactoredSGD(head.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})
    for _ in range(steps):
        backward(head)
        optimizer.step()
    return optimizer
