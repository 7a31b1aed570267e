"""Operations that restore the accuracy of the factors of W = V U + 1 ωᵀ. They leave W unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.matrix.arrays import Arrays
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.precision import product

__all__ = ["directions", "rebase", "reinvert", "renew"]


def reinvert(W: Arrays) -> None:
    """Computes U⁻¹ from U. O(w³)."""
    U_inv = _inverse(W.U)
    with uninterrupted():
        W.begin_change()
        W.put("U_inv", U_inv)
        W.changed()


def directions(W: Arrays) -> Tensor:
    """Returns P of U₁₁ = L P: the rows of U₁₁ made orthonormal, the longest first."""
    first = W.U[: W.width, : W.width]
    lengths = first.norm(dim=1)
    order = lengths.argsort(descending=True)
    P = torch.empty_like(first)
    P[order] = torch.linalg.qr((first / lengths.unsqueeze(1))[order].mT).Q.mT
    return P


def renew(W: Arrays, U: Tensor) -> None:
    """Begins a generation with the given U. O(w³), and O(w²) for each row that is carried over."""
    U_inv = _inverse(U)
    step = W.U @ U_inv
    with uninterrupted():
        W.begin_change()
        W.generations.begin(step)
        W.put("U", U)
        W.put("U_inv", U_inv)
        W.changed()
        W.generations.bound(W.V)


def rebase(W: Arrays, U: Tensor) -> None:
    """Writes all of V for the given U and ω = 0, in place and in row chunks. O(D w²)."""
    U_inv = _inverse(U)
    step, shift = W.U @ U_inv, (W.omega @ U_inv).to(W.dtype)
    with uninterrupted():
        W.begin_change()
        for part in W.V.chunks():
            W.V[part] = product(W.coordinates(part), step).add_(shift)
        W.generations.forget(len(U))
        W.put("U", U)
        W.put("U_inv", U_inv)
        W.omega.zero_()
        W.changed()


def _inverse(U: Tensor) -> Tensor:
    """U⁻¹. The rows of U are scaled to norm 1 first, which costs no digits."""
    lengths = U.norm(dim=1)
    scaled: Tensor = torch.linalg.inv(U / lengths.unsqueeze(1))
    scaled /= lengths
    return scaled
