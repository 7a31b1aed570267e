"""Random factors of gradients, and the dense gradients that they stand for."""

from __future__ import annotations

import torch

from softsphere.matrix.gradient import GradientFactors

D, d = 23, 4


def random_gradient(m: int, n: int, seed: int, width: int = d, rows: int = D) -> GradientFactors:
    """Random factors in float64; several entries in one place and in one row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    H = normal(m, width) * torch.logspace(0, -1, width, dtype=torch.float64)
    q = torch.rand(m, 1, generator=generator).double()
    t = torch.randint(rows, (n,), generator=generator) // 2
    # one entry a column has a form of its own
    cols = None if n == m else torch.randint(m, (n,), generator=generator)
    return GradientFactors(H, q * H, normal(m), t, cols, normal(n))


def in_dtype(g: GradientFactors, dtype: torch.dtype) -> GradientFactors:
    H, L, s, x = (part.to(dtype) for part in (g.H, g.L, g.s, g.x))
    return GradientFactors(H, L, s, g.rows, g.cols, x, cluster=g.cluster, rho=g.rho)


def dense_gradient(W: torch.Tensor, g: GradientFactors) -> torch.Tensor:
    """G by explicit loops."""
    J = W @ g.L.T + g.s
    for t, i, x in zip(g.rows.tolist(), g.columns().tolist(), g.x.tolist(), strict=True):
        J[t, i] += x
    return J @ g.H
