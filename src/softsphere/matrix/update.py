"""What a step does to the factors, computed before anything is changed.

W⁺ = W T + (1 sᵀ + E) R with T = κ + L̂ᵀ R, where κ = base ⊗ I is the map without a gradient, and
R = spread ⊗ H, L̂ = [L 0 …] are the gradient's factors, made as wide as W. Then, Woodbury's identity
for T⁻¹ and (·)₊ for the new values,

    U₊ = U κ + (U L̂ᵀ) R             N = S⁻¹ (R κ⁻¹ U⁻¹),   S = I + R κ⁻¹ L̂ᵀ
    ω₊ = κᵀω + Rᵀ(L̂ω + s)           U⁻¹₊ = κ⁻¹U⁻¹ − κ⁻¹L̂ᵀ N      R U⁻¹₊ = N
    V₊[t_j] = V[t_j] + x_j N[i_j]
    Q₊ = κᵀQκ + Rᵀ Z + Zᵀ R,        Z = (JᵀΠW) κ + ½ (JᵀΠJ) R
    w̄₊ = κᵀw̄ + Rᵀ (JᵀΠ1)

so a step of r factors is five products of r w² and five of r² w. With r above a share of w the pair
(L̂, R) is replaced by (I, L̂ᵀR) wherever T alone is meant. Increments are computed in the dtype of V
and added to float64, so what is rounded is the change and not the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softsphere.matrix.structured import StructuredGradient

if TYPE_CHECKING:
    from softsphere.matrix.factored import FactoredMatrix

__all__ = ["Blocks", "SingularStepError", "Update", "gram_times", "plan"]

# Above this share of w, r factors cost more than the w × w matrix that they make.
THIN = 0.75
# A pivot of S = I + … below this tells of a direction that is nearly lost.
HARSH = 0.5


class SingularStepError(RuntimeError):
    """A step that cannot be taken; the matrix is as it was."""


@dataclass(frozen=True)
class Blocks:
    """κ = base ⊗ I on the k blocks of W, and how the gradient is spread over them."""

    base: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...]

    def times(self, x: Tensor, *, inverse: bool = False, left: bool = False) -> Tensor:
        """x κ for x (…, w), or κ x for x (w, …); with κ⁻¹ where inverse."""
        if len(self.base) == 1:
            scale = self.base[0][0]
            return x / scale if inverse else x * scale
        base = torch.tensor(self.base, dtype=x.dtype, device=x.device)
        if inverse:
            base = torch.linalg.inv_ex(base).inverse
        if left:
            return torch.einsum("ab,bdz->adz", base, x.unflatten(0, (len(base), -1))).flatten(0, 1)
        return torch.einsum("...ad,ab->...bd", x.unflatten(-1, (len(base), -1)), base).flatten(-2)

    def inverse_column(self) -> tuple[float, ...]:
        """The first column of base⁻¹."""
        if len(self.base) == 1:
            return (1 / self.base[0][0],)
        (a, b), (c, d) = self.base
        det = a * d - b * c
        return d / det, -c / det

    def eigenbasis(self) -> tuple[tuple[float, ...], ...]:
        """Rows (1 0) and e with e base = λ e: what momentum only scales is written in the second.

        The identity where there are no two real and distinct λ.
        """
        if len(self.base) == 1:
            return ((1.0,),)
        (a, b), (c, d) = self.base
        under = (a - d) ** 2 / 4 + b * c
        if under <= 1e-12:
            return ((1.0, 0.0), (0.0, 1.0))
        half = under**0.5 if a >= d else -(under**0.5)
        return (1.0, 0.0), (c / ((d - a) / 2 - half), 1.0)

    def horizon(self, factor: float) -> int:
        """After how many steps κ alone has shrunk something `factor` times against the rest."""
        if len(self.base) == 1:
            return 1 << 30
        shrinking = max(self.base[1][1], 1e-3)
        return max(1, int(math.log(factor) / max(-math.log(shrinking), 1e-9)))

    def invertible(self) -> bool:
        """Whether κ has an inverse."""
        if len(self.base) == 1:
            return self.base[0][0] != 0
        (a, b), (c, d) = self.base
        return abs(a * d - b * c) > 1e-12 * max(abs(a * d), abs(b * c), 1e-300)


@dataclass(frozen=True)
class Update:
    """New small arrays, and increments (n, w) for the rows of V; or why there are none.

    harsh: the step shrinks some direction so much that the factors must be looked at.
    """

    rows: Tensor
    increments: Tensor
    small: dict[str, Tensor]
    refused: str | None = None
    harsh: bool = False


def scatter(gradient: StructuredGradient, values: Tensor) -> Tensor:
    """Eᵀ of (n, …) values at the entries, summed over the entries of each column: (r, …)."""
    weighted = values * gradient.x.reshape(-1, *[1] * (values.dim() - 1))
    out = weighted.new_zeros(gradient.rank, *values.shape[1:])
    return out.index_add_(0, gradient.cols, weighted)


def coincide(gradient: StructuredGradient, pi: Tensor | None, R: Tensor) -> Tensor:
    """Eᵀ Π E R: (r, w), without a D-sized or an n × n tensor.

    The rows x_j R[i_j] of equal targets are summed in a table of n places, then read back.
    """
    order = gradient.rows.argsort()
    rows = gradient.rows[order]
    place = torch.zeros_like(rows)
    if len(rows) > 1:
        place[1:] = (rows[1:] != rows[:-1]).cumsum(0)
    x = gradient.x[order].unsqueeze(1)
    cols = gradient.cols[order]
    table = R.new_zeros(len(rows), R.shape[1]).index_add_(0, place, x * R[cols])
    read = table[place] * x if pi is None else table[place] * (x * pi[rows].unsqueeze(1))
    return R.new_zeros(R.shape).index_add_(0, cols, read)


def rest(
    W: FactoredMatrix, gradient: StructuredGradient, R: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 sᵀ + E)ᵀ Π of W (r, width), of 1 (r), and of (1 sᵀ + E) R (r, w)."""
    g = gradient
    if g.at_rows is not None and width == g.at_rows.shape[1]:
        at_rows = g.at_rows
    else:
        at_rows = W.rows(g.rows, slice(0, width))
    pi = None if W.pi is None else W.pi[g.rows]
    s = g.s
    of_W = scatter(g, at_rows if pi is None else at_rows * pi.unsqueeze(1))
    of_W = torch.addr(of_W, s, W.small("colsum")[:width])
    e = scatter(g, torch.ones_like(g.x) if pi is None else pi)
    of_one = e + W.mass * s
    of_rest = coincide(g, W.pi, R)
    of_rest = torch.addr(of_rest, of_one, s @ R)
    of_rest = torch.addr(of_rest, s, e @ R)
    return of_W, of_one, of_rest


def gram_times(W: FactoredMatrix, gradient: StructuredGradient) -> Tensor:
    """Jᵀ Π J H: (r, d), by which Gᵀ Π G = Hᵀ (Jᵀ Π J H)."""
    g, d = gradient, W.width
    of_W, _, of_rest = rest(W, g, g.H, d)
    back = of_W + g.L @ W.small("gram")[:d, :d] if g.back is None else g.back
    if g.rank > d:
        return of_rest + back @ g.A + g.L @ (of_W.mT @ g.H)
    return of_rest + (back @ g.L.mT + g.L @ of_W.mT) @ g.H


def plan(W: FactoredMatrix, gradient: StructuredGradient, blocks: Blocks) -> Update:
    """The update, or on a CPU the reason why there is none.

    On a GPU, where asking costs a synchronisation, an update that cannot be taken leaves
    everything as it was and is remembered in W.watch for the next check.
    """
    g, d, w = gradient, W.width, W.V.shape[1]
    if not blocks.invertible():
        return Update(g.rows, g.H, {}, "weight decay takes all of W away; lower lr or weight_decay")
    Q, U, U_inv = W.small("gram"), W.small("U"), W.small("U_inv")
    R = torch.cat([g.H * scale for scale in blocks.spread], 1)
    of_W, of_one, of_rest = rest(W, g, R, w)
    thin = g.rank <= THIN * w
    L_T = g.L if thin else torch.eye(d, dtype=R.dtype, device=R.device)
    R_T = R if thin else g.L.mT @ R

    # T⁻¹ by Woodbury's identity
    R_back = blocks.times(R_T, inverse=True)
    S = torch.addmm(torch.eye(len(R_T), dtype=R.dtype, device=R.device), R_back[:, :d], L_T.mT)
    LU, pivots, _ = torch.linalg.lu_factor_ex(S)
    N = torch.linalg.lu_solve(LU, pivots, R_back @ U_inv)
    LN = L_T.mT @ N if thin else N
    column = blocks.inverse_column()
    new_U = blocks.times(W.U) + (U[:, :d] @ L_T.mT if thin else U[:, :d]) @ R_T
    new_U_inv = blocks.times(W.U_inv, inverse=True, left=True)
    new_U_inv -= torch.cat([LN * scale for scale in column])

    # Q, and the rows of V
    if thin:
        back = g.back if g.back is not None and w == d else of_W + g.L @ Q[:d]
        JJ = back[:, :d] @ g.L.mT + g.L @ of_W[:, :d].mT
        half = R.mT @ (blocks.times(back) + 0.5 * torch.addmm(of_rest, JJ, R))
        increments = g.x.unsqueeze(1) * N[g.cols]
    else:
        C = of_W.mT @ R
        RB = R_T.mT @ Q[:d] + C.mT
        half = RB[:, :d] @ R_T + R_T.mT @ C[:d] + R.mT @ of_rest
        half = blocks.times(RB) + 0.5 * half
        increments = (g.x.unsqueeze(1) * R[g.cols]) @ new_U_inv.to(R.dtype)
    new_Q = blocks.times(blocks.times(W.gram).mT) + (half + half.mT)
    J_one = of_one + g.L @ W.small("colsum")[:d]
    small = {
        "U": new_U,
        "U_inv": new_U_inv,
        "gram": new_Q,
        "omega": blocks.times(W.omega) + (g.L @ W.small("omega")[:d] + g.s) @ R,
        "colsum": blocks.times(W.colsum) + J_one @ R,
    }
    return guarded(W, g, small, increments, LU.diagonal().abs())


def guarded(
    W: FactoredMatrix,
    gradient: StructuredGradient,
    small: dict[str, Tensor],
    increments: Tensor,
    pivots: Tensor,
) -> Update:
    """The update if every number of it is finite and its map is not singular."""
    total = increments.sum()
    for value in small.values():
        total = total + value.sum()
    ok = total.isfinite()
    share = pivots.min() / pivots.max().clamp_min(1) if len(pivots) else total.new_ones(())
    ok = ok & (share > 64 * torch.finfo(pivots.dtype).eps)
    if W.V.device.type == "cpu":
        refused = None if bool(ok) else reason(gradient)
        return Update(gradient.rows, increments, small, refused, harsh=bool(share < HARSH))
    W.watch.refused = W.watch.refused | ~ok if W.watch.refused is not None else ~ok
    kept = {name: torch.where(ok, new, getattr(W, name)) for name, new in small.items()}
    return Update(gradient.rows, torch.where(ok, increments, 0.0), kept)


def reason(gradient: StructuredGradient) -> str:
    """Why a step cannot be taken, and what to do."""
    parts = (gradient.H, gradient.L, gradient.s, gradient.x)
    if not all(bool(part.isfinite().all()) for part in parts):
        return (
            "the gradient of the output layer holds a value that is not finite; look for an "
            "overflow in the layers below, lower lr, or clip. Nothing was changed"
        )
    return (
        "the step would make the output layer's map I − lr·A singular (lr · 2q'‖h‖² is near 1); "
        "lower lr. Nothing was changed"
    )
