"""What a step does to the factors, computed before anything is changed.

W⁺ = W T + (1 sᵀ + E) R with T = κ + L̂ᵀ R, where κ = base ⊗ I is the map without a gradient, and
R = spread ⊗ H, L̂ = [L 0 …] are the gradient's factors, made as wide as W. Then, Woodbury's identity
for T⁻¹ and (·)₊ for the new values,

    U₊ = U κ + (U L̂ᵀ) R             N = S⁻¹ (R κ⁻¹ U⁻¹),   S = I + R κ⁻¹ L̂ᵀ
    ω₊ = κᵀω + Rᵀ(L̂ω + s)           U⁻¹₊ = κ⁻¹U⁻¹ − κ⁻¹L̂ᵀ N      R U⁻¹₊ = N
    V₊[t_j] = V[t_j] + x_j N[i_j]
    G₊ = κᵀGκ + Rᵀ Z + Zᵀ R,        Z = (J_cᵀΠW_c) κ + ½ (J_cᵀΠJ_c) R
    w̄₊ = κᵀw̄ + Rᵀ (Jᵀπ)

where J = W Lᵀ + 1 sᵀ + E. J_c and W_c are J and W with their mean rows under π taken off, so that a
large common row costs no digits. With e = Eᵀπ,

    G = W_cᵀΠW_c    J_cᵀΠW_c = LG + EᵀΠW_c    J_cᵀΠJ_c = J_cᵀΠW_c Lᵀ + L (EᵀΠW_c)ᵀ + EᵀΠE − eeᵀ/M

A step of r factors is five products of r w² and five of r² w. With r above a share of w the pair
(L̂, R) is replaced by (I, L̂ᵀR) wherever T alone is meant. Increments are computed in the dtype of V
and added to float64, so only the change is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.precision import float32_is_exact

__all__ = ["HARSH", "SingularStepError", "Update", "gram_times", "plan", "times_weight"]

# Above this share of w, r factors cost more than the w × w matrix that they make.
THIN = 0.75
# With a pivot of S below this a step counts as harsh, and float32 loses digits of it.
HARSH = 0.8


class SingularStepError(RuntimeError):
    """A step that cannot be taken; the matrix is as it was."""


@dataclass(frozen=True)
class Update:
    """What is added: (n, w) to the rows of V, and to each small array after κ has acted on it.

    scaled: the small arrays after κ; empty where κ is a number and can act in place
    carried: (n, w) the rows of V in the current coordinates; None where they are in them already
    refused: why the step cannot be taken, None where it can
    flag: on a GPU, whether this or an earlier step was left out
    share: the smallest pivot of S, about how much the step leaves of the direction that it shrinks
        most; 1 on a GPU, where it is not asked for
    """

    rows: Tensor
    to_rows: Tensor
    to_small: dict[str, Tensor]
    scaled: dict[str, Tensor]
    blocks: Blocks
    carried: Tensor | None = None
    refused: str | None = None
    flag: Tensor | None = None
    share: float = 1.0

    def commit(self, W: Arrays) -> None:
        """Writes it all, in place: nothing large is allocated."""
        W.begin_change()
        if self.carried is not None:
            W.V[self.rows] = self.carried
            W.generations.made.index_fill_(0, self.rows, W.generations.now)
        W.V.add(self.rows, self.to_rows.to(W.dtype))
        for name, increment in self.to_small.items():
            array: Tensor = getattr(W, name)
            if name in self.scaled:
                array.copy_(self.scaled[name])
            elif self.blocks.base[0][0] != 1:
                array.mul_(self.blocks.base[0][0] ** POWER[name])
            array.add_(increment)
        W.renamed()
        W.changed()

    def after(self, W: Arrays, name: str) -> Tensor:
        """What a small array will be."""
        if name in self.scaled:
            return self.scaled[name] + self.to_small[name]
        before: Tensor = getattr(W, name)
        return before * self.blocks.base[0][0] ** POWER[name] + self.to_small[name]


# How often κ acts on each small array.
POWER = {"U": 1, "U_inv": -1, "centred_gram": 2, "omega": 1, "colsum": 1}


def under(blocks: Blocks, W: Arrays) -> dict[str, Tensor]:
    """The small arrays after κ."""
    return {
        "U": blocks.times(W.U),
        "U_inv": blocks.times(W.U_inv, inverse=True, left=True),
        "centred_gram": blocks.times(blocks.times(W.centred_gram).mT),
        "omega": blocks.times(W.omega),
        "colsum": blocks.times(W.colsum),
    }


def to_columns(gradient: GradientFactors, values: Tensor) -> Tensor:
    """Eᵀ of (n, …) values at the entries, summed over the entries of each column: (r, …)."""
    weighted = values * gradient.x.reshape(-1, *[1] * (values.dim() - 1))
    if gradient.cols is None:
        return weighted
    out = weighted.new_zeros(gradient.rank, *values.shape[1:])
    return out.index_add_(0, gradient.cols, weighted)


def at_entries(gradient: GradientFactors, values: Tensor) -> Tensor:
    """values (r, …) of the column of each entry: (n, …)."""
    return values if gradient.cols is None else values[gradient.cols]


def entries_times(gradient: GradientFactors, pi: Tensor | None, R: Tensor) -> Tensor:
    """Eᵀ Π E R: (r, w), without a D-sized or an n × n tensor.

    The rows x_j R[i_j] of equal targets are summed in a table of n places, then read back.
    """
    order = gradient.rows.argsort()
    rows = gradient.rows[order]
    place = torch.zeros_like(rows)
    if len(rows) > 1:
        place[1:] = (rows[1:] != rows[:-1]).cumsum(0)
    weighted = gradient.x.unsqueeze(1) * at_entries(gradient, R)
    table = torch.zeros_like(weighted).index_add_(0, place, weighted[order])
    read = torch.empty_like(weighted)
    read[order] = table[place]
    if pi is not None:
        read = read * pi.unsqueeze(1)
    return to_columns(gradient, read)


def entries_gram(gradient: GradientFactors, pi: Tensor | None) -> Tensor:
    """Eᵀ Π E: (r, r), by an n × n table of which targets are equal."""
    weighted = gradient.x if pi is None else gradient.x * pi
    equal = gradient.rows.unsqueeze(1) == gradient.rows
    table = equal * torch.outer(weighted, gradient.x)
    if gradient.cols is None:
        return table
    out = table.new_zeros(gradient.rank, gradient.rank)
    across = table.new_zeros(gradient.rank, len(table)).index_add_(0, gradient.cols, table)
    return out.index_add_(1, gradient.cols, across)


@dataclass(frozen=True)
class Rest:
    """What E makes with W less its mean row (r, width), and e = Eᵀπ (r)."""

    of_weight: Tensor
    e: Tensor
    pi: Tensor | None
    mass: float

    @classmethod
    def of(
        cls,
        W: Arrays,
        gradient: GradientFactors,
        width: int,
        coordinates: Tensor | None = None,
    ) -> Rest:
        """Eᵀ Π W_c, of `width` columns of W, whose rows may have their coordinates known."""
        g, dtype = gradient, gradient.H.dtype
        if g.at_rows is not None and width == g.at_rows.shape[1]:
            at_rows = g.at_rows
        else:
            at = W.coordinates(g.rows) if coordinates is None else coordinates
            at_rows = (W.outputs(at, slice(0, width)) - W.mean[:width]).to(dtype)
        pi = None if W.pi is None else W.pi[g.rows].to(dtype)
        of_W = to_columns(g, at_rows if pi is None else at_rows * pi.unsqueeze(1))
        e = to_columns(g, torch.ones_like(g.x) if pi is None else pi)
        return cls(of_W, e, pi, W.mass)

    def gram(self, gradient: GradientFactors) -> Tensor:
        """E_cᵀ Π E_c: (r, r)."""
        return torch.addr(entries_gram(gradient, self.pi), self.e, self.e, alpha=-1 / self.mass)

    def times(self, gradient: GradientFactors, R: Tensor) -> Tensor:
        """E_cᵀ Π E_c R: (r, w)."""
        own = entries_times(gradient, self.pi, R)
        return torch.addr(own, self.e, self.e @ R, alpha=-1 / self.mass)

    def sums(self, W: Arrays, gradient: GradientFactors) -> Tensor:
        """Jᵀ π: (r)."""
        g = gradient
        colsum = W.small("colsum", g.H.dtype)[: W.width]
        return self.e + W.mass * g.s + g.L @ colsum


def times_centred(W: Arrays, gradient: GradientFactors, rest: Rest) -> Tensor:
    """J_cᵀ Π W_c: (r, d)."""
    g, d = gradient, W.width
    if g.centred_back is not None:
        return g.centred_back
    return rest.of_weight + g.L @ W.small("centred_gram", g.H.dtype)[:d, :d]


def times_weight(W: Arrays, gradient: GradientFactors) -> Tensor:
    """Jᵀ Π W: (r, d)."""
    g, d = gradient, W.width
    rest = Rest.of(W, g, d)
    return torch.addr(times_centred(W, g, rest), rest.sums(W, g), W.small("mean", g.H.dtype)[:d])


def gram_times(W: Arrays, gradient: GradientFactors) -> Tensor:
    """Jᵀ Π J H: (r, d), by which Hᵀ Jᵀ Π J H is the Gram matrix of J H."""
    g, d = gradient, W.width
    rest = Rest.of(W, g, d)
    back, sums = times_centred(W, g, rest), rest.sums(W, g)
    own = torch.addr(rest.times(g, g.H), sums, sums @ g.H, alpha=1 / W.mass)
    if g.rank > d:
        return own + back @ g.A + g.L @ (rest.of_weight.mT @ g.H)
    return own + (back @ g.L.mT + g.L @ rest.of_weight.mT) @ g.H


def plan(
    W: Arrays, gradient: GradientFactors, blocks: Blocks, flag: Tensor | None = None
) -> Update:
    """The update, or on a CPU the reason why there is none.

    A harsh step is a small difference of large numbers, so it is computed again in float64. On a
    GPU, where asking costs a synchronisation, and where float32 products are rounded, every step
    is. There an update that cannot be taken leaves everything as it was and sets its `flag`, as
    does every one after it until somebody asks.
    """
    g, blocks = gradient, blocks.with_weight(gradient.rho)
    if not blocks.finite():
        why = "lr, momentum, dampening and weight_decay must be finite. Nothing was changed"
        return Update(g.rows, g.H, {}, {}, blocks, refused=why)
    if not blocks.invertible():
        why = "weight decay takes all of W away; lower lr or weight_decay"
        return Update(g.rows, g.H, {}, {}, blocks, refused=why)
    if W.device.type == "cpu" and float32_is_exact():
        update = compute(W, g.to(W.dtype), blocks, flag)
        if update.share >= HARSH:
            return update
    return compute(W, g.to(torch.float64), blocks, flag)


def compute(W: Arrays, gradient: GradientFactors, blocks: Blocks, flag: Tensor | None) -> Update:
    """The update in the dtype of the gradient."""
    g, d, w, dtype = gradient, W.width, W.V.width, gradient.H.dtype
    G, U, U_inv = (W.small(name, dtype) for name in ("centred_gram", "U", "U_inv"))
    R = spread_out(g.H, blocks.spread)
    carried = None if W.generations.alone else W.coordinates(g.rows)
    rest = Rest.of(W, g, w, carried)
    of_W = rest.of_weight
    thin = g.rank <= THIN * w
    L_T = g.L if thin else torch.eye(d, dtype=R.dtype, device=R.device)
    R_T = R if thin else g.L.mT @ R

    # T⁻¹ by Woodbury's identity; S is small and near I, so its inverse is as good as a solve
    eye = torch.eye(len(R_T), dtype=R.dtype, device=R.device)
    R_back = blocks.times(R_T, inverse=True)
    LU, pivots, _ = torch.linalg.lu_factor_ex(torch.addmm(eye, R_back[:, :d], L_T.mT))
    N = torch.linalg.lu_solve(LU, pivots, eye) @ (R_back @ U_inv)
    LN = L_T.mT @ N if thin else N

    if thin:
        back = g.centred_back if g.centred_back is not None and w == d else of_W + g.L @ G[:d]
        # J_cᵀΠJ_c = (J_cᵀΠW_c)Lᵀ + L(EᵀΠW_c)ᵀ + E_cᵀΠE_c
        if len(g.rows) <= 2 * w:
            JJ = torch.addmm(rest.gram(g), g.L, of_W[:, :d].mT).addmm_(back[:, :d], g.L.mT)
            JJR = JJ @ R
        else:
            JJ = torch.addmm(g.L @ of_W[:, :d].mT, back[:, :d], g.L.mT)
            JJR = torch.addmm(rest.times(g, R), JJ, R)
        half = R.mT @ blocks.times(back).add(JJR, alpha=0.5)
        to_rows = g.x.unsqueeze(1) * at_entries(g, N)
    else:
        C = of_W.mT @ R
        RB = R_T.mT @ G[:d] + C.mT
        half = RB[:, :d] @ R_T + R_T.mT @ C[:d] + R.mT @ rest.times(g, R)
        half = blocks.times(RB) + 0.5 * half
        after = blocks.times(U_inv, inverse=True, left=True) - blocks.columns(LN)
        to_rows = (g.x.unsqueeze(1) * at_entries(g, R)) @ after
    to_small = {
        "U": (U[:, :d] @ L_T.mT if thin else U[:, :d]) @ R_T,
        "U_inv": -blocks.columns(LN),
        "centred_gram": half + half.mT,
        "omega": (g.L @ W.small("omega", dtype)[:d] + g.s) @ R,
        "colsum": rest.sums(W, g) @ R,
    }
    scaled = under(blocks, W) if W.blocks > 1 else {}
    seen = (N, half, to_rows, to_small["omega"], to_small["colsum"])
    update = Update(g.rows, to_rows, to_small, scaled, blocks, carried)
    return guarded(W, g, update, seen, LU.diagonal(), flag)


def spread_out(H: Tensor, spread: tuple[float, ...]) -> Tensor:
    """spread ⊗ H: (r, w)."""
    return H * spread[0] if len(spread) == 1 else torch.cat([H * scale for scale in spread], 1)


def guarded(
    W: Arrays,
    gradient: GradientFactors,
    update: Update,
    seen: tuple[Tensor, ...],
    pivots: Tensor,
    flag: Tensor | None,
) -> Update:
    """The update if all that is `seen` is finite and S not singular by its pivots.

    On a GPU, where asking would wait for it, one that changes nothing otherwise.
    """
    total = sum((part.sum() for part in seen), pivots.new_zeros(()))
    size = pivots.abs()
    share = size.min() / size.max().clamp_min(1) if len(size) else total.new_ones(())
    ok = total.isfinite() & (share > 64 * torch.finfo(pivots.dtype).eps)
    if W.device.type == "cpu":
        refused = None if bool(ok) else reason(gradient)
        return replace(update, refused=refused, share=float(share))
    flag = ~ok if flag is None else flag | ~ok
    ok = ~flag
    scaled = update.scaled or under(update.blocks, W)
    return replace(
        update,
        flag=flag,
        to_rows=torch.where(ok, update.to_rows, 0.0),
        to_small={name: torch.where(ok, x, 0.0) for name, x in update.to_small.items()},
        scaled={name: torch.where(ok, x, getattr(W, name)) for name, x in scaled.items()},
    )


def reason(gradient: GradientFactors) -> str:
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
