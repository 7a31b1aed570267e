"""(s, q, c) of H W_cᵀ from what a stack of factored matrices keeps, with its structured gradient.

The formulas are those of `factored_statistics`, with a matrix W_c for each row of H: that of its
target. They are computed in float64, as all arrays of a stack are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere._torch import values_readable
from softsphere.engines.factored_statistics import TWICE_IN_CLUSTERS
from softsphere.engines.sums_of_outputs import SumsOfOutputs, lost_rows
from softsphere.matrix import FactoredTensor, StructuredGradient
from softsphere.matrix.abstract import Block
from softsphere.matrix.factored_stack import FactoredStack
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_tensors import Content
from softsphere.matrix.segments import Segments
from softsphere.matrix.stack_arrays import StackArrays
from softsphere.matrix.turns import in_turn
from softsphere.stats import Stats

__all__ = ["stack_statistics"]

# Matrices of so many rows are computed together, and larger ones one after another.
_SMALL = 64
# The numbers of rows of small matrices that are in memory at once.
_NUMBERS = 1 << 22


def stack_statistics(H: Tensor, weight: FactoredTensor, target: Tensor) -> Stats:
    """Statistics of rows H (n, w) over the matrices of their targets, in O(w²) a row.

    Args:
        H: (n, w)
        weight: a stack of matrices, (D, w).
        target: (n), a row of the stack for each row of H.
    """
    s, q, c = _StackStatistics.apply(H, weight, target)  # type: ignore[no-untyped-call]
    W = _arrays(weight.block)
    pi = None if W.pi is None else W.pi[target].unsqueeze(1)
    return Stats(s, q, c, W.mass[W.cluster_of(target)].to(H.dtype), pi=pi)


def _arrays(block: Block) -> StackArrays:
    """The arrays of a stack. Raises TypeError if the block is of one matrix."""
    if not isinstance(block.matrix, FactoredStack):
        raise TypeError("the leaves of a clustered layer need a stack of matrices, got one matrix")
    return block.matrix.arrays


def _times_gram(W: StackArrays, H: Tensor, cluster: Tensor) -> Tensor:
    """Each row of H (n, w) times G of its matrix, in float64."""
    P = torch.empty_like(H)
    for piece in Segments.of(cluster).pieces(W.width):
        piece.put(piece.take(H) @ W.of("centred_gram", piece.ids), P)
    return P


def _terms(W: StackArrays, H: Tensor, cluster: Tensor) -> Tensor:
    """Σ_j h_j² G_jj of each row of H with G of its matrix: (n)."""
    diagonal = W.centred_gram.diagonal(dim1=1, dim2=2)[cluster]
    return (H.square() * diagonal).sum(1) * W.scale[cluster].square()


def _from_outputs(W: StackArrays, H: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x̄·h (n), hᵀGh (n) and G h (n, w) of rows h from the outputs of their matrices."""
    mu, q = H.new_empty(2, len(H))
    P = torch.empty_like(H)
    small = W.sizes[cluster] <= _SMALL
    order = cluster.argsort()
    few, size = order[small[order]], max(1, _NUMBERS // (_SMALL * W.width))
    for first in range(0, len(few), size):
        some = few[first : first + size]
        mu[some], q[some], P[some] = _of_small(W, H[some], cluster[some])
    for c in cluster[~small].unique():
        own = cluster == c
        sums = SumsOfOutputs(H[own], W.mean(c.unsqueeze(0))[0])
        leaves = torch.arange(int(W.starts[c]), int(W.starts[c + 1]), device=H.device)
        for some in leaves.split(sums.chunk_size(W.V.chunk_size())):
            sums.add(W.rows(some), None if W.pi is None else W.pi[some])
        mu[own], q[own], P[own] = sums.found(W.mass[c])
    return mu, q, P


def _of_small(W: StackArrays, H: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_from_outputs` of rows whose matrices have few rows, each with its own copy of them."""
    ids, slot = cluster.unique(return_inverse=True)
    sizes = W.sizes[ids].unsqueeze(1)
    offset = torch.arange(int(sizes.max()), device=H.device)
    index = W.starts[ids].unsqueeze(1) + torch.minimum(offset, sizes - 1)
    weight = (offset < sizes).double()
    if W.pi is not None:
        weight *= W.pi[index]
    rows = W.rows(index.flatten()).view(*index.shape, W.width)
    sums = SumsOfOutputs(H.unsqueeze(1), W.mean(cluster))
    sums.add(rows[slot], weight[slot])
    mu, q, P = sums.found(W.mass[cluster].unsqueeze(1))
    return mu.squeeze(1), q.squeeze(1), P.squeeze(1)


class _StackStatistics(torch.autograd.Function):
    """s = M μ, q = q_c + M μ², c = μ + H·(W[t] − r); see `factored_statistics`."""

    @staticmethod
    @in_turn
    def forward(
        ctx: Any, H: Tensor, weight: FactoredTensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        W = _arrays(weight.block)
        ctx.block, ctx.edition = weight.block, weight.matrix.edition
        cluster, exact = W.cluster_of(target), H.double()
        P, r, mass = _times_gram(W, exact, cluster), W.mean(cluster), W.mass[cluster]
        mu = (exact * r).sum(1)
        at_rows = W.rows(target).double() - r
        q = (P * exact).sum(1).clamp_min(0)
        if values_readable(q):
            lost = lost_rows(W, q, _terms(W, exact, cluster))
            if bool(lost.any()):
                mu[lost], q[lost], P[lost] = _from_outputs(W, exact[lost], cluster[lost])
        q += mass * mu * mu
        c = (at_rows * exact).sum(1) + mu
        ctx.save_for_backward(H, target, cluster, P, mu, at_rows)
        return (mass * mu).to(H.dtype), q.to(H.dtype), c.unsqueeze(1).to(H.dtype)

    @staticmethod
    @in_turn
    def backward(
        ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor
    ) -> tuple[Tensor | None, StructuredGradient | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE_IN_CLUSTERS)
        H, target, cluster, P, mu, at_rows = ctx.saved_tensors
        W = _arrays(ctx.block)
        if ctx.block.matrix.edition != ctx.edition:
            raise RuntimeError(
                "the factored weight has been changed since this loss was computed; "
                "call backward before the optimizer's step, or compute the loss again"
            )
        gs, gq, gc = gs.double(), gq.double(), gc.double().squeeze(1)
        back = 2 * gq.unsqueeze(1) * P + gc.unsqueeze(1) * at_rows
        by_hidden = None
        if ctx.needs_input_grad[0]:
            by_mean = W.mass[cluster] * (gs + 2 * gq * mu) + gc
            by_hidden = (back + by_mean.unsqueeze(1) * W.mean(cluster)).to(H.dtype)
        if not ctx.needs_input_grad[1]:
            return by_hidden, None, None
        # Copies, since the caller may write into these tensors later.
        H, rows = H.clone(), target.clone()
        x = gc if W.pi is None else gc / W.pi[rows]
        L, s, x, back, at_rows = (
            y.to(H.dtype) for y in (2 * gq.unsqueeze(1) * H, gs, x, back, at_rows)
        )
        value = GradientFactors(H, L, s, rows, None, x, back, at_rows, cluster=cluster)
        return by_hidden, StructuredGradient(Content(value, ctx.block, ctx.edition)), None
