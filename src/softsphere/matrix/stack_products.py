"""Products of a structured gradient with a stack of matrices; none costs anything in rows of W.

The identities are those of `gradient_products`, one matrix W_c at a time: each factor of the
gradient belongs to one matrix and has one entry. Everything is computed in float64, since reading
the float64 arrays of a matrix costs more than the few products with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.segments import Piece, Segments
from softsphere.matrix.stack_arrays import StackArrays

__all__ = ["StackProducts", "dense_stack_gradient", "stack_inner_product"]


@dataclass(frozen=True)
class StackProducts:
    """What a gradient of r factors knows of its matrices, one row for each factor.

    gradient: in float64
    segments: the factors of each matrix
    pi, e: (r) π at the entries, and Eᵀπ
    mass: (r) M
    of_weight: (r, w) EᵀΠW, with the mean row taken off W
    back: (r, w) J_cᵀΠW_c
    sums: (r) Jᵀπ
    """

    gradient: GradientFactors
    segments: Segments
    pi: Tensor
    e: Tensor
    mass: Tensor
    of_weight: Tensor
    back: Tensor
    sums: Tensor

    @classmethod
    def of(cls, W: StackArrays, gradient: GradientFactors) -> StackProducts:
        """Reads the rows of W that have entries, unless the gradient has kept them."""
        assert gradient.cols is None and gradient.cluster is not None
        g, cluster = gradient.to(torch.float64), gradient.cluster
        segments = Segments.of(cluster)
        pi = torch.ones_like(g.x) if W.pi is None else W.pi[g.rows].double()
        at_rows = g.at_rows
        if at_rows is None:
            at_rows = W.rows(g.rows).double() - W.mean(cluster)
        e = g.x * pi
        of_weight, mass = e.unsqueeze(1) * at_rows, W.mass[cluster]
        back = g.centred_back
        if back is None:
            back = of_weight.clone()
            for piece in segments.pieces(W.width):
                product = piece.take(g.L) @ W.of("centred_gram", piece.ids)
                piece.put(piece.take(of_weight) + product, back)
        sums = e + mass * g.s + (g.L * W.of("colsum", cluster)).sum(1)
        return cls(g, segments, pi, e, mass, of_weight, back, sums)

    def entries_times(self, R: Tensor) -> Tensor:
        """EᵀΠE R for R (r, w): rows of equal targets are added up, then read back."""
        g = self.gradient
        return self.e.unsqueeze(1) * g.places.sums_for_each(g.x.unsqueeze(1) * R)

    def times(self, piece: Piece, R: Tensor, own: Tensor) -> Tensor:
        """J_cᵀΠJ_c R of the factors of a piece: (k, p, w).

        Args:
            piece: some matrices and their factors.
            R: (r, w)
            own: (r, w) EᵀΠE R.
        """
        e = piece.take(self.e)
        mass = piece.take(self.mass)[:, :1]
        back, of_weight, L = (piece.take(x) for x in (self.back, self.of_weight, self.gradient.L))
        factors = piece.take(R)
        result = piece.take(own) + _chain(back, L, factors) + _chain(L, of_weight, factors)
        total = (e.unsqueeze(1) @ factors).squeeze(1) / mass
        return result.sub_(e.unsqueeze(2) * total.unsqueeze(1))

    def gram_times(self, R: Tensor) -> Tensor:
        """JᵀΠJ R: (r, w)."""
        result, own = torch.empty_like(R), self.entries_times(R)
        for piece in self.segments.pieces(R.shape[1]):
            sums = piece.take(self.sums)
            total = sums.unsqueeze(1) @ piece.take(R) / piece.take(self.mass)[:, :1].unsqueeze(2)
            piece.put(self.times(piece, R, own) + sums.unsqueeze(2) * total, result)
        return result


def _chain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a bᵀ c for (k, p, w) each, in the order that costs less."""
    return (a @ b.mT) @ c if a.shape[1] <= a.shape[2] else a @ (b.mT @ c)


def stack_inner_product(W: StackArrays, one: GradientFactors, two: GradientFactors) -> Tensor:
    """tr(G₁ᵀ Π G₂) of two gradients that were taken at W."""
    # This needs the left factors of both gradients and the right factors of the second.
    both = StackProducts.of(W, one if one is two else one * 0.0 + two)
    cross = both.gram_times(both.gradient.H)[: one.rank]
    result = (cross * one.H).sum(dtype=torch.float64)
    for rho, other in ((one.rho, two), (two.rho, one)):
        if rho:
            result = result + rho * _with_weight(W, other)
    if one.rho and two.rho:
        result = result + one.rho * two.rho * W.squares().sum()
    return result


def _with_weight(W: StackArrays, gradient: GradientFactors) -> Tensor:
    """tr(Wᵀ Π J H)."""
    x = StackProducts.of(W, gradient)
    assert x.gradient.cluster is not None
    times_weight = x.back + x.sums.unsqueeze(1) * W.mean(x.gradient.cluster)
    return (times_weight * x.gradient.H).sum()


def dense_stack_gradient(W: StackArrays, gradient: GradientFactors) -> Tensor:
    """The gradient as a new tensor (D, w)."""
    assert gradient.cluster is not None
    g = gradient.to(torch.float64)
    dense = W.to_dense().mul_(g.rho) if g.rho else torch.zeros_like(W.V[:])
    for piece in Segments.of(gradient.cluster).pieces(W.width):
        H, L, s = piece.take(g.H), piece.take(g.L), piece.take(g.s)
        A, b = L.mT @ H, (s.unsqueeze(1) @ H)
        local = W.local(piece.ids)
        for part in W.segments(piece.ids).pieces(W.width, W.V.chunk_size()):
            at = local[part.ids]
            V = W.V[part.index.flatten()].view(*part.index.shape, W.width)
            rows = W.outputs(part.ids, V, W.old[part.index]).double() @ A[at] + b[at]
            part.put(rows.to(W.dtype) + dense[part.index], dense)
    return dense.index_add_(0, g.rows, g.X.to(dense.dtype))
