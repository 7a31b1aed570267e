"""What a step does to a stack of factored matrices, computed before anything is changed.

The formulas are those of `step` with one block of columns, for each matrix that has factors in the
gradient. κ, a number, acts on all matrices. The increments of the w × w arrays are kept as products
of p × w factors until they are added, so that a step that is planned needs little memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.equal_indices import Places
from softsphere.matrix.abstract import POWER
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.safeguard import reason, smallest_share, unusable
from softsphere.matrix.segments import Piece
from softsphere.matrix.stack_arrays import StackArrays
from softsphere.matrix.stack_products import StackProducts
from softsphere.matrix.step import THIN

__all__ = ["Increments", "StackUpdate", "plan_stack"]


@dataclass(frozen=True)
class Increments:
    """What is added to the small arrays of some matrices, after κ has acted on them.

    ids: (k) the matrices
    products: for U and U⁻¹, the factors (k, w, p) and (k, p, w) of what is added, U L̂ᵀ and R, L̂ᵀ
        and −N/κ; None in the place of the first stands for I
    half: for G, the factors of a product that is added with its transpose
    vectors: for ω and w̄, what is added (k, w)
    share: (k) the smallest pivot of S, about the share that is left of the direction that the
        step shrinks most
    """

    ids: Tensor
    products: dict[str, tuple[Tensor | None, Tensor]]
    half: tuple[Tensor, Tensor]
    vectors: dict[str, Tensor]
    share: Tensor

    def all(self) -> dict[str, Tensor]:
        """What is added, by the name of the small array."""
        left, right = self.half
        both = torch.cat([left, right.mT], 2) @ torch.cat([right, left.mT], 1)
        increments = {name: b if a is None else a @ b for name, (a, b) in self.products.items()}
        return {**increments, "centred_gram": both, **self.vectors}

    def after(self, W: StackArrays, name: str, kappa: float, chosen: Tensor) -> Tensor:
        """Returns U or U⁻¹ of the chosen ones of the matrices after the step."""
        left, right = self.products[name]
        before = W.of(name, self.ids[chosen]) * kappa ** POWER[name]
        added = right[chosen]
        return before + added if left is None else torch.baddbmm(before, left[chosen], added)

    def maps(self, kappa: float, chosen: Tensor) -> Tensor:
        """Returns T = κ + L̂ᵀR of the chosen ones of the matrices."""
        (left, _), (_, right) = self.products["U_inv"], self.products["U"]
        T = right[chosen] if left is None else left[chosen] @ right[chosen]
        T.diagonal(dim1=1, dim2=2).add_(kappa)
        return T

    def squares_after(self, W: StackArrays, kappa: float) -> Tensor:
        """The sums of squares of the columns of each W_c after the step: (k, w)."""
        left, right = self.half
        spread = W.centred_gram.diagonal(dim1=1, dim2=2)[self.ids]
        scale = (W.scale[self.ids] * kappa).unsqueeze(1)
        spread = spread * scale.square() + 2 * (left.mT * right).sum(1)
        colsum = W.colsum[self.ids] * scale + self.vectors["colsum"]
        return spread + colsum.square() / W.mass[self.ids].unsqueeze(1)


@dataclass(frozen=True)
class StackUpdate:
    """The update of a step.

    kappa: κ
    rows, places: (r) the rows of V that change, and where equal ones are
    carried, to_rows: (r, w) these rows in the current coordinates, and what is added to them
    parts: what is added to the small arrays
    refused: why the step cannot be taken; None where it can
    """

    kappa: float
    rows: Tensor
    carried: Tensor
    to_rows: Tensor
    parts: tuple[Increments, ...] = ()
    places: Places | None = None
    refused: str | None = None

    @property
    def ids(self) -> Tensor:
        """The matrices that have factors in the gradient."""
        none = [self.rows.new_empty(0)]
        return torch.cat([part.ids for part in self.parts] or none)

    @property
    def share(self) -> Tensor:
        """The smallest pivot of each of these matrices."""
        none = [self.to_rows.new_empty(0)]
        return torch.cat([part.share for part in self.parts] or none)

    def commit(self, W: StackArrays) -> None:
        """Writes the update in place."""
        W.begin_change()
        if self.kappa != 1:
            W.multiply(self.kappa)
        if W.maps is not None:
            W.V[self.rows] = self.carried
            W.old[self.rows] = False
        W.V.add(self.rows, self.to_rows, self.places)
        for part in self.parts:
            W.add(part.ids, part.all())
        W.renamed()


def plan_stack(W: StackArrays, gradient: GradientFactors, blocks: Blocks) -> StackUpdate:
    """Computes the update of a step; its `refused` says whether it can be taken."""
    blocks = blocks.with_weight(gradient.rho)
    kappa, why = float(blocks.base[0][0]), unusable(blocks)
    if why is not None:
        return StackUpdate(kappa, gradient.rows, gradient.H, gradient.H, refused=why)
    x = StackProducts.of(W, gradient)
    g = x.gradient
    R = g.H * blocks.spread[0]
    own, to_rows = x.entries_times(R), torch.empty_like(R)
    V, old = W.V[g.rows], W.old[g.rows]
    carried = V.clone()
    parts, refused = [], None
    for piece in x.segments.pieces(W.width):
        part, N = _increments(W, x, piece, R, own, kappa)
        piece.put(N, to_rows)
        if W.maps is not None:
            piece.put(W.carried(piece.ids, piece.take(V), piece.take(old)), carried)
        refused = _refusal(W, g, part, N, kappa)
        if refused is not None:
            break
        parts.append(part)
    to_rows = g.x.unsqueeze(1) * to_rows
    return StackUpdate(kappa, g.rows, carried, to_rows, tuple(parts), g.places, refused)


def _increments(
    W: StackArrays, x: StackProducts, piece: Piece, R: Tensor, own: Tensor, kappa: float
) -> tuple[Increments, Tensor]:
    """Returns the increments of the matrices of a piece, and R U⁻¹ after the step (k, p, w)."""
    ids, w = piece.ids, W.width
    U, U_inv = W.of("U", ids), W.of("U_inv", ids)
    L, factors = piece.take(x.gradient.L), piece.take(R)
    thin = L.shape[1] <= THIN * w
    R_T = factors if thin else L.mT @ factors

    # Woodbury's identity, as in `step`
    S = (R_T @ L.mT if thin else R_T) / kappa
    S.diagonal(dim1=1, dim2=2).add_(1)
    LU, pivots, _ = torch.linalg.lu_factor_ex(S)
    N = torch.linalg.lu_solve(LU, pivots, R_T @ U_inv / kappa)
    N_rows = N if thin else factors @ (U_inv - N) / kappa

    Z = kappa * piece.take(x.back) + 0.5 * x.times(piece, R, own)
    at_omega = (L @ W.of("omega", ids).unsqueeze(2)).squeeze(2) + piece.take(x.gradient.s)
    vectors = {"omega": at_omega, "colsum": piece.take(x.sums)}
    size = LU.diagonal(dim1=1, dim2=2).abs()
    part = Increments(
        ids,
        {
            "U": (U @ L.mT if thin else U, R_T),
            "U_inv": (L.mT, N / -kappa) if thin else (None, N / -kappa),
        },
        (factors.mT, Z),
        {name: (v.unsqueeze(1) @ factors).squeeze(1) for name, v in vectors.items()},
        size.amin(1) / size.amax(1).clamp_min(1),
    )
    return part, N_rows


def _refusal(
    W: StackArrays, g: GradientFactors, part: Increments, N: Tensor, kappa: float
) -> str | None:
    """Says why the increments cannot be added; None if they can."""
    seen = (N, *part.half, *part.vectors.values())
    total = torch.stack([values.sum() for values in seen]).sum()
    enough = smallest_share(W.width, N.shape[1], torch.float64)
    is_regular = (part.share > enough).all()
    fits = (part.squares_after(W, kappa) <= torch.finfo(W.dtype).max).all()
    if bool(total.isfinite() & is_regular & fits):
        return None
    return reason(g, bool((part.share <= enough).any()), W.dtype)
