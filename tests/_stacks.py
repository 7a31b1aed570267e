"""A stack of factored matrices, random gradients of it, and the dense gradients they stand for."""

from __future__ import annotations

import torch

from softsphere.matrix.gradient import GradientFactors

# matrices without rows, with one, and with more than there are columns
SIZES = torch.tensor([5, 0, 1, 17, 2, 0, 8])
STARTS = torch.cat([torch.zeros(1, dtype=torch.long), SIZES.cumsum(0)])
D, d = int(STARTS[-1]), 4
CLUSTER = torch.arange(len(SIZES)).repeat_interleave(SIZES)


def measure(seed: int) -> torch.Tensor:
    """A base measure (D), normalised in each matrix."""
    generator = torch.Generator().manual_seed(seed)
    pi = torch.rand(D, generator=generator, dtype=torch.float64) + 0.2
    sums = torch.zeros(len(SIZES), dtype=torch.float64).index_add_(0, CLUSTER, pi)
    return pi / sums[CLUSTER] * SIZES[CLUSTER]


def random_stack_gradient(m: int, seed: int, crowded: bool = False) -> GradientFactors:
    """Random factors in float64, of which several may have their entry in one row.

    crowded: whether all of them are of one matrix.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    H = normal(m, d) * torch.logspace(0, -1, d, dtype=torch.float64)
    q = torch.rand(m, 1, generator=generator).double()
    t = torch.randint(D, (m,), generator=generator)
    if crowded:
        t = STARTS[3] + t % SIZES[3]
    return GradientFactors(H, q * H, normal(m), t, None, normal(m), cluster=CLUSTER[t])


def dense_stack_gradient(W: torch.Tensor, g: GradientFactors) -> torch.Tensor:
    """G by explicit loops over matrices and factors."""
    G = g.rho * W
    for i, t in enumerate(g.rows.tolist()):
        rows = CLUSTER[t] == CLUSTER
        J = W[rows] @ g.L[i] + g.s[i]
        G[rows] += torch.outer(J, g.H[i])
        G[t] += g.x[i] * g.H[i]
    return G
