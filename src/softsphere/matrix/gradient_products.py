"""Products of a structured gradient J H with W and with other gradients; none costs anything in D.

With J = W Lᵀ + 1 sᵀ + E, the mean row r of W, W_c = W − 1 rᵀ, G = W_cᵀΠW_c and e = Eᵀπ,

    Jᵀπ = M (s + L r) + e                 J_c = J − 1 (Jᵀπ)ᵀ/M
    J_cᵀΠW_c = L G + EᵀΠW_c               JᵀΠW = J_cᵀΠW_c + (Jᵀπ) rᵀ
    J_cᵀΠJ_c = J_cᵀΠW_c Lᵀ + L (EᵀΠW_c)ᵀ + EᵀΠE − eeᵀ/M
    JᵀΠJ = J_cᵀΠJ_c + (Jᵀπ)(Jᵀπ)ᵀ/M
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.equal_indices import add_at
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.precision import is_asynchronous, matmul

__all__ = ["EntryProducts", "at_entries", "dense_gradient", "inner_product"]


def at_entries(gradient: GradientFactors, values: Tensor) -> Tensor:
    """Takes for each of the n entries the value of its column: (r, …) to (n, …)."""
    return values if gradient.cols is None else values[gradient.cols]


def _to_columns(gradient: GradientFactors, values: Tensor, deterministic: bool) -> Tensor:
    """Eᵀ times values (n, …) that are given at the entries, one value for each: (r, …)."""
    x = gradient.x.reshape(-1, *[1] * (values.dim() - 1))
    return _column_sums(gradient, values * x, deterministic)


def _column_sums(gradient: GradientFactors, values: Tensor, deterministic: bool) -> Tensor:
    """The sums of values (n, …) that are given at the entries over each column of E: (r, …)."""
    if gradient.cols is None:
        return values
    out = values.new_zeros(gradient.rank, *values.shape[1:])
    return add_at(out, gradient.cols, values, deterministic=deterministic)


def _entries_times(
    gradient: GradientFactors, pi: Tensor | None, R: Tensor, deterministic: bool
) -> Tensor:
    """EᵀΠE R (r, w), without a tensor of size D or n × n.

    The rows x_j R[i_j] of equal targets are added up in a table of n places, then read back.
    """
    weighted = gradient.x.unsqueeze(1) * at_entries(gradient, R)
    read = gradient.places.sums_for_each(weighted, deterministic=deterministic)
    if pi is not None:
        read = read * pi.unsqueeze(1)
    return _to_columns(gradient, read, deterministic)


def _entries_gram(gradient: GradientFactors, pi: Tensor | None, deterministic: bool) -> Tensor:
    """EᵀΠE (r, r), from an n × n table that says which targets are equal."""
    weighted = gradient.x if pi is None else gradient.x * pi
    if gradient.cols is None and gradient.places.first is None:
        return torch.diag(weighted * gradient.x)
    equal = gradient.rows.unsqueeze(1) == gradient.rows
    table = equal * torch.outer(weighted, gradient.x)
    if gradient.cols is None:
        return table
    out = table.new_zeros(gradient.rank, gradient.rank)
    across = table.new_zeros(gradient.rank, len(table))
    add_at(across, gradient.cols, table, deterministic=deterministic)
    return add_at(out, gradient.cols, across.mT, deterministic=deterministic).mT


@dataclass(frozen=True)
class EntryProducts:
    """Products with the entries E of a gradient; E_c is E − 1 eᵀ/M.

    of_weight: EᵀΠW_c (r, width)
    e: Eᵀπ (r)
    pi: (n) π at the rows of the entries, or None for one everywhere
    mass: M
    deterministic: whether sums have the same bits every time on a GPU too, as the ranks of a
        sharded matrix need them, each of which computes all of them
    """

    of_weight: Tensor
    e: Tensor
    pi: Tensor | None
    mass: float
    deterministic: bool

    @classmethod
    def of(
        cls, W: Arrays, gradient: GradientFactors, width: int, coordinates: Tensor | None = None
    ) -> EntryProducts:
        """Reads the rows of W that have entries, unless the gradient has kept them.

        Args:
            W: the matrix that the gradient was taken at.
            gradient: of r factors and n entries.
            width: the number of columns of W that are wanted.
            coordinates: (n, w) the coordinates of those rows, if they are known.
        """
        g, dtype = gradient, gradient.H.dtype
        if g.at_rows is not None and width == g.at_rows.shape[1]:
            at_rows = g.at_rows
        else:
            at = W.target_coordinates(g.rows) if coordinates is None else coordinates
            at_rows = W.centred_outputs(at, slice(0, width), dtype)
        pi = W.target_pi(g.rows)
        pi = None if pi is None else pi.to(dtype)
        same = W.shards is not None and is_asynchronous(W.device)
        of_weight = _to_columns(g, at_rows if pi is None else at_rows * pi.unsqueeze(1), same)
        e = _column_sums(g, g.x if pi is None else g.x * pi, same)
        return cls(of_weight, e, pi, W.mass, same)

    def gram(self, gradient: GradientFactors) -> Tensor:
        """E_cᵀΠE_c (r, r)."""
        table = _entries_gram(gradient, self.pi, self.deterministic)
        return table.addr_(self.e, self.e, alpha=-1 / self.mass)

    def times(self, gradient: GradientFactors, R: Tensor) -> Tensor:
        """E_cᵀΠE_c R (r, w)."""
        own = _entries_times(gradient, self.pi, R, self.deterministic)
        return own.addr_(self.e, self.e @ R, alpha=-1 / self.mass)

    def sums(self, W: Arrays, gradient: GradientFactors, out: Tensor | None = None) -> Tensor:
        """Jᵀπ (r), written into `out` if it is given."""
        colsum = W.small("colsum", gradient.H.dtype)[: W.width]
        own = torch.add(self.e, gradient.s, alpha=W.mass, out=out)
        return own.addmv_(gradient.L, colsum)

    def centred_back(self, W: Arrays, gradient: GradientFactors) -> Tensor:
        """J_cᵀΠW_c (r, width)."""
        width = self.of_weight.shape[1]
        known = gradient.centred_back
        if known is not None and known.shape[1] == width:
            return known
        gram = W.small("centred_gram", gradient.H.dtype)
        return self.of_weight + matmul(gradient.L, gram[: W.width, :width])


def _times_weight(W: Arrays, gradient: GradientFactors) -> Tensor:
    """JᵀΠW (r, d)."""
    entries = EntryProducts.of(W, gradient, W.width)
    mean = W.small("mean", gradient.H.dtype)[: W.width]
    return torch.addr(entries.centred_back(W, gradient), entries.sums(W, gradient), mean)


def _gram_times(W: Arrays, gradient: GradientFactors) -> Tensor:
    """JᵀΠJH (r, d). Hᵀ times it is the Gram matrix of the gradient."""
    g = gradient
    entries = EntryProducts.of(W, g, W.width)
    back, sums = entries.centred_back(W, g), entries.sums(W, g)
    own = torch.addr(entries.times(g, g.H), sums, sums @ g.H, alpha=1 / W.mass)
    if g.rank > W.width:
        return own + back @ g.A + g.L @ (entries.of_weight.mT @ g.H)
    return own + (back @ g.L.mT + g.L @ entries.of_weight.mT) @ g.H


def inner_product(W: Arrays, one: GradientFactors, two: GradientFactors) -> Tensor:
    """tr(G₁ᵀ Π G₂) of two gradients that were taken at W, in O(r² d)."""
    # This term uses the left factors of both gradients and the right factors of the second.
    both = one if one is two else one * 0.0 + two
    cross = _gram_times(W, both)[: one.rank]
    result = (cross * one.H).sum(dtype=torch.float64)
    for rho, other in ((one.rho, two), (two.rho, one)):
        if rho:
            result += rho * (_times_weight(W, other) * other.H).sum(dtype=torch.float64)
    if one.rho and two.rho:
        result += one.rho * two.rho * W.gram.diagonal()[: W.width].sum()
    return result


def dense_gradient(W: Arrays, gradient: GradientFactors) -> Tensor:
    """The gradient as a new tensor (D, d), in row chunks."""
    g = gradient
    dense = torch.empty(W.num_rows, W.width, dtype=W.dtype, device=W.device)
    A, b = g.A.to(W.dtype), g.b.to(W.dtype)
    for part in W.V.chunks():
        rows = W.outputs(W.coordinates(part), W.block(0))
        dense[part] = rows @ A + b
        if g.rho:
            dense[part] += g.rho * rows
    rows_of_V, which = W.own_targets(g.rows)
    return dense.index_add_(0, rows_of_V, g.X.to(dense.dtype)[which])
