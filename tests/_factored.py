"""A small factored layer, and functions that train it."""

from __future__ import annotations

import torch

from softsphere import (
    FactoredSphericalLoss,
)
from softsphere.optim import FactoredSGD

NAMES = ("squared_error", "spherical_softmax", "taylor_softmax", "z_loss", "bohning_bound")


d, D = 6, 31


def layer(name="taylor_softmax", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return FactoredSphericalLoss(d, D, name, dtype=dtype, **options)


def train(head, steps, lr=0.5, m=4, seed=1, **sgd):
    """Takes some steps and returns the optimizer."""
    optimizer = FactoredSGD(head.parameters(), lr=lr, **sgd)
    go_on(head, optimizer, steps, m, seed)
    return optimizer


def go_on(head, optimizer, steps, m=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        hidden = torch.randn(m, d, generator=generator, dtype=torch.float64)
        target = torch.randint(D, (m,), generator=generator)
        optimizer.zero_grad()
        head(hidden.to(head.weight.dtype), target).backward()
        optimizer.step()


def unscaled(head):
    """The gradient with respect to [W b] without its factor π, from that of the parameter."""
    G, pi = head.weight.grad.to_dense(), head.matrix.arrays.pi
    return G if pi is None else G / pi.sqrt().unsqueeze(1)
