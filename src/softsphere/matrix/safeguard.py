"""Whether a step can be taken, found before anything is changed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from softsphere._torch import sum_of_norms
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks, as_tensor
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.inverse import Inverse
from softsphere.matrix.precision import is_asynchronous
from softsphere.matrix.update import Update
from softsphere.matrix.wear import LAST_CONDITION, amplification, block_sizes
from softsphere.unread import step_is_recorded, values_are_unread

__all__ = ["guarded", "reason", "smallest_share", "unusable"]


def unusable(blocks: Blocks) -> str | None:
    """Says why no step can be taken with this map of the blocks; None if one can."""
    if not blocks.finite():
        return "lr, momentum, dampening and weight_decay must be finite. The weight was not changed"
    if not blocks.invertible():
        return "the weight decay of this step removes all of W; lower lr or weight_decay"
    return None


def guarded(
    W: Arrays,
    gradient: GradientFactors,
    update: Update,
    inverse: Inverse,
    flag: Tensor | None,
    final: bool,
) -> Update:
    """Returns the update if all of it is finite and S is not singular by its pivots.

    The sums of squares of W's columns must be finite in its dtype as well, which W then is too.
    Otherwise the update says why it is refused; on a GPU, where asking would wait for the device,
    it is one that changes nothing. So is a step there that has to be computed again: one whose
    inverse was not found, and unless it is final one after which the factors would be worn out.
    """
    squares, most = _squares(W, update), torch.finfo(W.dtype).max
    changes = update.to_rows, *update.to_small.memory
    share, solved = inverse.share, inverse.solved
    enough = smallest_share(W.V.width, len(inverse.value), inverse.value.dtype)
    if not is_asynchronous(W.device):
        refused = None
        # A number that is not finite leaves no sum finite. On a CPU sums take less time than norms.
        total = sum(float(x.sum()) for x in changes)
        if not (math.isfinite(total) and float(squares.max()) <= most and share > enough):
            refused = reason(gradient, bool(share <= enough), W.dtype)
        return replace(update, refused=refused, share=float(share))
    ok = _size(changes, squares) <= most
    # What products have not solved is no reason to refuse a step. Of two booleans a > b is a & ~b.
    now = solved > ok if solved is not None else ~(ok & (share > enough))
    flag = now if flag is None else flag | now
    # A compiled step in float32 is solved only if it is calm, after which a CPU does not look.
    calm = step_is_recorded() and gradient.H.dtype == torch.float32
    can_be_taken = solved if final or calm else _lasts(W, update, solved)
    undone = None if can_be_taken is None else ~can_be_taken
    left_out = flag if undone is None else flag | undone
    blocks, scaled = update.blocks, update.scaled
    if scaled:
        scaled = {name: torch.where(left_out, getattr(W, name), x) for name, x in scaled.items()}
    elif not blocks.is_identity:
        scale = as_tensor(blocks.base[0][0], W.U).masked_fill(left_out, 1.0)
        blocks = Blocks(((scale,),), blocks.spread)
    for x in changes:
        x.masked_fill_(left_out, 0.0)
    return replace(
        update,
        flag=flag,
        undone=None if undone is None else undone > flag,
        deviation=inverse.deviation,
        blocks=blocks,
        scaled=scaled,
    )


def _size(changes: tuple[Tensor, ...], squares: Tensor) -> Tensor:
    """A number () that is finite if all of these are, and at least as large as the squares."""
    if squares.device.type != "cpu" or not values_are_unread():
        return sum_of_norms((*changes, squares.to(changes[0].dtype)))
    # a program that is compiled on a CPU fuses sums, and no norms
    return torch.stack([x.sum().abs() for x in changes]).sum() + squares.amax()


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
            "overflow in the layers below, lower lr, or clip. The weight was not changed"
        )
    if not singular:
        return (
            f"the step would make the weight so large that its squares overflow in {dtype}, as in "
            "training that diverges; lower lr, or clip. The weight was not changed"
        )
    return (
        "the step would make the output layer's map I − lr·A singular (lr · 2q'‖h‖² is near 1); "
        "lower lr. The weight was not changed"
    )


def _lasts(W: Arrays, update: Update, solved: Tensor | None) -> Tensor:
    """Whether a step was solved and leaves κ within its last limit: () boolean."""
    size = block_sizes(W) if W.blocks > 1 else None
    after = amplification(update.after(W, "U"), update.after(W, "U_inv"), size)
    fits = after <= LAST_CONDITION * math.sqrt(W.V.width)
    return fits if solved is None else fits & solved


def _squares(W: Arrays, update: Update) -> Tensor:
    """Σ_k π_k W_kj² of each column of W after the step (w), in float64."""
    spread = update.after(W, "centred_gram", diagonal=True)
    colsum = update.after(W, "colsum")
    return torch.addcmul(spread, colsum, colsum, value=1 / W.mass)
