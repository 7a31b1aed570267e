"""What a step does to the factors, computed before anything is changed.

W⁺ = W T + (1 sᵀ + E) R with T = κ + L̂ᵀ R, where κ = base ⊗ I is the map without a gradient, and
R = spread ⊗ H, L̂ = [L 0 …] are the gradient's factors, made as wide as W. With Woodbury's identity
for T⁻¹, (·)₊ for the new values, and J_c, W_c, G, e as in `gradient_products`,

    U₊ = U κ + (U L̂ᵀ) R             N = S⁻¹ (R κ⁻¹ U⁻¹),   S = I − K,  K = −R κ⁻¹ L̂ᵀ
    ω₊ = κᵀω + Rᵀ(L̂ω + s)           U⁻¹₊ = κ⁻¹U⁻¹ − κ⁻¹L̂ᵀ N      R U⁻¹₊ = N
    V₊[t_j] = V[t_j] + x_j N[i_j]
    G₊ = κᵀGκ + Rᵀ Z + Zᵀ R,        Z = (J_cᵀΠW_c) κ + ½ (J_cᵀΠJ_c) R
    w̄₊ = κᵀw̄ + Rᵀ (Jᵀπ)

A step of r factors is five products of r w² and four of r² w. With r above a share of w the pair
(L̂, R) is replaced by (I, L̂ᵀR) wherever T alone is meant. Increments are computed in the dtype of V
and added to float64, so only the change is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks, Number
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_products import EntryProducts, at_entries
from softsphere.matrix.inverse import Inverse, by_elimination, by_few_products, by_products
from softsphere.matrix.precision import (
    add_matmul,
    float32_is_exact,
    float32_pays,
    is_asynchronous,
    matmul,
)
from softsphere.matrix.safeguard import guarded, unusable
from softsphere.matrix.update import SmallIncrements, Update

__all__ = ["HARSH", "THIN", "plan"]

# Above this share of w, r factors cost more than the w × w matrix that they make.
THIN = 0.75
# A step whose smallest pivot of S is below this is harsh, and float32 loses digits of it.
HARSH = 0.8
# The numbers between two rows of a matrix whose transpose is read.
_PAD = 16


def plan(
    W: Arrays,
    gradient: GradientFactors,
    blocks: Blocks,
    flag: Tensor | None = None,
    products: int = 0,
    products_in_float32: int = 0,
    *,
    final: bool = False,
) -> Update:
    """Computes the update of a step. On a CPU its `refused` says whether it can be taken.

    A harsh step is a small difference of large numbers, so it is computed again in float64. On a
    GPU, where asking for the share would wait for the device, steps are computed in float64 unless
    those before were calm and float32 takes less time. An update there that cannot be taken changes
    nothing and sets its `flag`; so does every later one until the flag is read. One that is to be
    computed again changes nothing either, and says so by `undone`.

    products: how many factors the inverse has as a product; 0 stands for elimination.
    products_in_float32: how many of them a calm step needs in float32; 0 if no step is calm. final:
    whether the step is taken however it wears the factors, as on a CPU.
    """
    g, blocks = gradient, blocks.with_weight(gradient.rho)
    why = unusable(blocks)
    if why is not None:
        return Update(g.rows, g.H, SmallIncrements(0, g.H), {}, blocks, refused=why)
    if not is_asynchronous(W.device) and float32_is_exact():
        update = _compute(W, g.to(W.dtype), blocks, flag, products, final)
        if update.share >= HARSH:
            return update
    elif products_in_float32 and float32_pays(W.device, g.rank, W.V.width):
        return _compute(W, g.to(W.dtype), blocks, flag, products_in_float32, final)
    return _compute(W, g.to(torch.float64), blocks, flag, products, final)


def _compute(
    W: Arrays,
    gradient: GradientFactors,
    blocks: Blocks,
    flag: Tensor | None,
    products: int,
    final: bool,
) -> Update:
    """Computes the update in the dtype of the gradient."""
    g, d, w, dtype = gradient, W.width, W.V.width, gradient.H.dtype
    U, U_inv = W.small("U", dtype), W.small("U_inv", dtype)
    R = _spread_out(g.H, blocks.spread)
    carried = None if W.generations.alone else W.target_coordinates(g.rows)
    entries = EntryProducts.of(W, g, w, carried)
    thin = g.rank <= THIN * w
    R_T = R if thin else matmul(g.L.mT, R)

    # Woodbury's identity. S is small and near I, so its inverse is as accurate as a solve.
    R_back = blocks.times(R_T, inverse=True)
    minus_L = -g.L if thin else None
    K = -R_back[:, :d] if minus_L is None else matmul(R_back[:, :d], minus_L.mT)
    inverse = _inverse(K, products)
    N = matmul(inverse.value, matmul(R_back, U_inv))

    to_small = SmallIncrements(w, N)
    whole = to_small["U_inv"] if blocks.is_identity else None
    minus_LN = torch.neg(N, out=whole) if minus_L is None else matmul(minus_L.mT, N, out=whole)
    if whole is None:
        blocks.columns(minus_LN, out=to_small["U_inv"])

    # What R is multiplied by from the left: the rows of U if there are few factors, and two more.
    few = w if thin else 0
    left = N.new_empty(few + 2, g.rank)
    torch.addmv(g.s, g.L, W.small("omega", dtype)[:d], out=left[few])
    entries.sums(W, g, out=left[few + 1])
    if thin:
        matmul(U[:, :d], g.L.mT, out=left[:w])
        half = matmul(R.mT, _right_of_gram(W, g, R, entries, blocks), out=_transposable(R))
        to_rows = g.x.unsqueeze(1) * at_entries(g, N)
    else:
        matmul(U[:, :d], R_T, out=to_small["U"])
        half = _gram_from_map(W, g, R, R_T, entries, blocks)
        after = blocks.times(U_inv, inverse=True, left=True) + to_small["U_inv"]
        to_rows = matmul(g.x.unsqueeze(1) * at_entries(g, R), after)
    matmul(left, R, out=to_small.images[w - few :])
    torch.add(half, half.mT, out=to_small["centred_gram"])
    scaled = _scaled(blocks, W) if W.blocks > 1 else {}
    places = g.places if W.shards is None else None
    update = Update(g.rows, to_rows, to_small, scaled, blocks, carried, places)
    return guarded(W, g, update, inverse, flag, final)


def _inverse(K: Tensor, products: int) -> Inverse:
    """(I − K)⁻¹, by that many products if it is asked for, and else by what is cheaper."""
    if products:
        return by_products(K, products, HARSH if K.dtype == torch.float32 else 0.0)
    if is_asynchronous(K.device):
        return by_elimination(K, measured=True)
    found = by_few_products(K, HARSH)
    return by_elimination(K) if found is None else found


def _right_of_gram(
    W: Arrays, gradient: GradientFactors, R: Tensor, entries: EntryProducts, blocks: Blocks
) -> Tensor:
    """Z (r, w), where RᵀZ + ZᵀR is added to G, by products with the r factors.

    RᵀZ needs to be right only but for a skew matrix, so that of J_cᵀΠJ_c, which is symmetric, one
    product suffices: with X = J_cᵀΠW_c + EᵀΠW_c, it is E_cᵀΠE_c and the mean of X Lᵀ and L Xᵀ.
    """
    g, d = gradient, W.width
    back = entries.centred_back(W, g)
    both = back[:, :d] + entries.of_weight[:, :d]
    if len(g.rows) <= 2 * R.shape[1]:
        own = matmul(add_matmul(entries.gram(g), both, g.L.mT), R)
    else:
        own = add_matmul(entries.times(g, R), matmul(both, g.L.mT), R)
    return torch.add(blocks.times(back), own, alpha=0.5, out=own)


def _gram_from_map(
    W: Arrays,
    gradient: GradientFactors,
    R: Tensor,
    R_T: Tensor,
    entries: EntryProducts,
    blocks: Blocks,
) -> Tensor:
    """Half of RᵀZ + ZᵀR but for a skew matrix, by products with R_T = LᵀR, for many factors.

    As in `_right_of_gram`, one product with R_T stands for two.
    """
    d = W.width
    across = matmul(R.mT, entries.of_weight)
    back = matmul(R_T.mT, W.small("centred_gram", R.dtype)[:d]).add_(across)
    own = matmul((back + across)[:, :d], R_T)
    add_matmul(own, R.mT, entries.times(gradient, R))
    return torch.add(blocks.times(back), own, alpha=0.5, out=_transposable(R))


def _transposable(like: Tensor) -> Tensor:
    """Memory for a matrix (w, w) in the dtype of another (…, w), whose transpose is read fast.

    The first numbers of rows of 2ⁿ numbers compete for a few lines of a CPU's cache, so that
    reading the transpose would take as long as a product. These rows are a bit longer.
    """
    w = like.shape[1]
    pad = 0 if is_asynchronous(like.device) else _PAD
    return like.new_empty(w, w + pad)[:, :w]


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
