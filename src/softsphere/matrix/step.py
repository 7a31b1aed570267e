"""What a step does to the factors, computed before anything is changed.

W⁺ = W T + (1 sᵀ + E) R with T = κ + L̂ᵀ R, where κ = base ⊗ I is the map without a gradient, and
R = spread ⊗ H, L̂ = [L 0 …] are the gradient's factors, made as wide as W. With Woodbury's identity
for T⁻¹, (·)₊ for the new values, and J_c, W_c, G, e as in `gradient_products`,

    U₊ = U κ + (U L̂ᵀ) R             N = S⁻¹ (R κ⁻¹ U⁻¹),   S = I + R κ⁻¹ L̂ᵀ
    ω₊ = κᵀω + Rᵀ(L̂ω + s)           U⁻¹₊ = κ⁻¹U⁻¹ − κ⁻¹L̂ᵀ N      R U⁻¹₊ = N
    V₊[t_j] = V[t_j] + x_j N[i_j]
    G₊ = κᵀGκ + Rᵀ Z + Zᵀ R,        Z = (J_cᵀΠW_c) κ + ½ (J_cᵀΠJ_c) R
    w̄₊ = κᵀw̄ + Rᵀ (Jᵀπ)

A step of r factors is five products of r w² and five of r² w. With r above a share of w the pair
(L̂, R) is replaced by (I, L̂ᵀR) wherever T alone is meant. Increments are computed in the dtype of V
and added to float64, so only the change is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softsphere._torch import sum_of_norms
from softsphere.matrix.abstract import POWER
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks, Number, as_tensor
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_products import EntryProducts, at_entries
from softsphere.matrix.precision import float32_is_exact, is_asynchronous

__all__ = [
    "HARSH",
    "THIN",
    "SingularStepError",
    "Update",
    "plan",
    "reason",
    "smallest_share",
    "unusable",
]

# Above this share of w, r factors cost more than the w × w matrix that they make.
THIN = 0.75
# A step whose smallest pivot of S is below this is harsh, and float32 loses digits of it.
HARSH = 0.8


class SingularStepError(RuntimeError):
    """A step that cannot be taken. The matrix is as it was before."""


@dataclass(frozen=True)
class Update:
    """What is added to the rows of V, and to each small array after κ has acted on it.

    rows: (n) the rows of V that change
    to_rows: (n, w) what is added to them
    to_small: by the name of each small array, what is added to it
    scaled: the small arrays after κ; empty where κ is a number and can act in place
    blocks: κ and the spread of the gradient over the blocks
    carried: (n, w) the rows of V in the current coordinates; None where they are in them already
    refused: why the step cannot be taken; None where it can
    flag: on a GPU, whether this or an earlier step was left out
    share: the smallest pivot of S, about the share that is left of the direction that the step
        shrinks most; 1 on a GPU, where it is not read
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
        """Writes the update in place; no large tensor is allocated."""
        W.begin_change()
        if self.carried is not None:
            W.V[self.rows] = self.carried
            W.generations.made.index_fill_(0, self.rows, W.generations.now)
        W.V.add(self.rows, self.to_rows.to(W.dtype))
        for name, increment in self.to_small.items():
            array: Tensor = getattr(W, name)
            if name in self.scaled:
                array.copy_(self.scaled[name])
            elif not self.blocks.is_identity:
                array.mul_(self.blocks.base[0][0] ** POWER[name])
            array.add_(increment)
        W.renamed()
        W.changed()

    def after(self, W: Arrays, name: str, diagonal: bool = False) -> Tensor:
        """Returns the value that a small array, or its diagonal, will have after the step."""
        before: Tensor = getattr(W, name)
        before, change = self.scaled.get(name, before), self.to_small[name]
        if diagonal:
            before, change = before.diagonal(), change.diagonal()
        if name in self.scaled or self.blocks.is_identity:
            return before + change
        return before * self.blocks.base[0][0] ** POWER[name] + change


def plan(
    W: Arrays, gradient: GradientFactors, blocks: Blocks, flag: Tensor | None = None
) -> Update:
    """Computes the update of a step. On a CPU its `refused` says whether it can be taken.

    A harsh step is a small difference of large numbers, so it is computed again in float64. Every
    step is computed in float64 on a GPU, where asking for the share would wait for the device, and
    where float32 products are rounded. On a GPU an update that cannot be taken changes nothing and
    sets its `flag`; so does every later one until the flag is read.
    """
    g, blocks = gradient, blocks.with_weight(gradient.rho)
    why = unusable(blocks)
    if why is not None:
        return Update(g.rows, g.H, {}, {}, blocks, refused=why)
    if not is_asynchronous(W.device) and float32_is_exact():
        update = _compute(W, g.to(W.dtype), blocks, flag)
        if update.share >= HARSH:
            return update
    return _compute(W, g.to(torch.float64), blocks, flag)


def unusable(blocks: Blocks) -> str | None:
    """Says why no step can be taken with this map of the blocks; None if one can."""
    if not blocks.finite():
        return "lr, momentum, dampening and weight_decay must be finite. Nothing was changed"
    if not blocks.invertible():
        return "the weight decay of this step removes all of W; lower lr or weight_decay"
    return None


def _compute(W: Arrays, gradient: GradientFactors, blocks: Blocks, flag: Tensor | None) -> Update:
    """Computes the update in the dtype of the gradient."""
    g, d, w, dtype = gradient, W.width, W.V.width, gradient.H.dtype
    U, U_inv = W.small("U", dtype), W.small("U_inv", dtype)
    R = _spread_out(g.H, blocks.spread)
    carried = None if W.generations.alone else W.coordinates(g.rows)
    entries = EntryProducts.of(W, g, w, carried)
    thin = g.rank <= THIN * w
    L_T = g.L if thin else torch.eye(d, dtype=dtype, device=R.device)
    R_T = R if thin else g.L.mT @ R

    # Woodbury's identity. S is small and near I, so its inverse is as accurate as a solve.
    eye = torch.eye(len(R_T), dtype=dtype, device=R.device)
    R_back = blocks.times(R_T, inverse=True)
    LU, pivots, _ = torch.linalg.lu_factor_ex(torch.addmm(eye, R_back[:, :d], L_T.mT))
    N = torch.linalg.lu_solve(LU, pivots, eye) @ (R_back @ U_inv)
    LN = L_T.mT @ N if thin else N

    if thin:
        half = _half_of_gram(W, g, R, entries, blocks)
        to_rows = g.x.unsqueeze(1) * at_entries(g, N)
    else:
        half = _half_of_gram_from_map(W, g, R, R_T, entries, blocks)
        after = blocks.times(U_inv, inverse=True, left=True) - blocks.columns(LN)
        to_rows = (g.x.unsqueeze(1) * at_entries(g, R)) @ after
    to_small = {
        "U": (U[:, :d] @ L_T.mT if thin else U[:, :d]) @ R_T,
        "U_inv": -blocks.columns(LN),
        "centred_gram": half + half.mT,
        "omega": (g.L @ W.small("omega", dtype)[:d] + g.s) @ R,
        "colsum": entries.sums(W, g) @ R,
    }
    scaled = _scaled(blocks, W) if W.blocks > 1 else {}
    seen = (N, half, to_rows, to_small["omega"], to_small["colsum"])
    update = Update(g.rows, to_rows, to_small, scaled, blocks, carried)
    return _guarded(W, g, update, seen, LU.diagonal(), flag)


def _largest_square(W: Arrays, update: Update) -> Tensor:
    """The largest Σ_k π_k W_kj² of a column of W after the step, in float64."""
    spread = update.after(W, "centred_gram", diagonal=True)
    return (spread + update.after(W, "colsum").square() / W.mass).max()


def _half_of_gram(
    W: Arrays, gradient: GradientFactors, R: Tensor, entries: EntryProducts, blocks: Blocks
) -> Tensor:
    """Rᵀ Z by products with the r factors."""
    g, d = gradient, W.width
    back, of_weight = entries.centred_back(W, g), entries.of_weight[:, :d]
    if len(g.rows) <= 2 * R.shape[1]:
        own = torch.addmm(entries.gram(g), g.L, of_weight.mT).addmm_(back[:, :d], g.L.mT)
        of_gradient = own @ R
    else:
        own = torch.addmm(g.L @ of_weight.mT, back[:, :d], g.L.mT)
        of_gradient = torch.addmm(entries.times(g, R), own, R)
    return R.mT @ blocks.times(back).add(of_gradient, alpha=0.5)


def _half_of_gram_from_map(
    W: Arrays,
    gradient: GradientFactors,
    R: Tensor,
    R_T: Tensor,
    entries: EntryProducts,
    blocks: Blocks,
) -> Tensor:
    """Rᵀ Z by products with the w × w matrix R_T = LᵀR, for many factors."""
    d = W.width
    across = entries.of_weight.mT @ R
    back = R_T.mT @ W.small("centred_gram", R.dtype)[:d] + across.mT
    own = back[:, :d] @ R_T + R_T.mT @ across[:d] + R.mT @ entries.times(gradient, R)
    return blocks.times(back) + 0.5 * own


def _scaled(blocks: Blocks, W: Arrays) -> dict[str, Tensor]:
    """Returns the small arrays after κ."""
    return {
        "U": blocks.times(W.U),
        "U_inv": blocks.times(W.U_inv, inverse=True, left=True),
        "centred_gram": blocks.times(blocks.times(W.centred_gram).mT),
        "omega": blocks.times(W.omega),
        "colsum": blocks.times(W.colsum),
    }


def _spread_out(H: Tensor, spread: tuple[Number, ...]) -> Tensor:
    """spread ⊗ H: (r, w)."""
    return H * spread[0] if len(spread) == 1 else torch.cat([H * scale for scale in spread], 1)


def _guarded(
    W: Arrays,
    gradient: GradientFactors,
    update: Update,
    seen: tuple[Tensor, ...],
    pivots: Tensor,
    flag: Tensor | None,
) -> Update:
    """Returns the update if all of `seen` is finite and S is not singular by its pivots.

    The sums of squares of W's columns must be finite in its dtype as well, which W then is too.
    Otherwise the update says why it is refused; on a GPU, where asking would wait for the device,
    it is one that changes nothing.
    """
    total, share = sum_of_norms(seen), pivots.new_ones(())
    if len(pivots):
        least, most = pivots.abs().aminmax()
        share = least / most.clamp_min(1)
    enough = smallest_share(W.V.width, len(pivots), pivots.dtype)
    ok = (total < torch.inf) & (share > enough)
    ok = ok & (_largest_square(W, update) <= torch.finfo(W.dtype).max)
    if not is_asynchronous(W.device):
        refused = None if bool(ok) else reason(gradient, bool(share <= enough), W.dtype)
        return replace(update, refused=refused, share=float(share))
    flag = ~ok if flag is None else flag | ~ok
    ok, blocks = ~flag, update.blocks
    if len(blocks.base) == 1 and not blocks.is_identity:
        scale = torch.where(ok, as_tensor(blocks.base[0][0], W.U), 1.0)
        blocks = Blocks(((scale,),), blocks.spread)
    return replace(
        update,
        flag=flag,
        blocks=blocks,
        to_rows=torch.where(ok, update.to_rows, 0.0),
        to_small={name: torch.where(ok, x, 0.0) for name, x in update.to_small.items()},
        scaled={name: torch.where(ok, x, getattr(W, name)) for name, x in update.scaled.items()},
    )


def smallest_share(width: int, rank: int, dtype: torch.dtype) -> float:
    """The share below which S is singular as far as its rounding errors let it be known.

    Each entry of S sums up to w products, and elimination subtracts up to as many more.
    """
    return max(64, width + rank) * torch.finfo(dtype).eps


def reason(gradient: GradientFactors, singular: bool, dtype: torch.dtype) -> str:
    """Says why a step cannot be taken, and how to mend it."""
    parts = (gradient.H, gradient.L, gradient.s, gradient.x)
    if not all(bool(part.isfinite().all()) for part in parts):
        return (
            "the gradient of the output layer holds a value that is not finite; look for an "
            "overflow in the layers below, lower lr, or clip. Nothing was changed"
        )
    if not singular:
        return (
            f"the step would make the weight so large that its squares overflow in {dtype}, as in "
            "training that diverges; lower lr, or clip. Nothing was changed"
        )
    return (
        "the step would make the output layer's map I − lr·A singular (lr · 2q'‖h‖² is near 1); "
        "lower lr. Nothing was changed"
    )
