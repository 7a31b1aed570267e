"""Operations that restore the accuracy of a stack's factors. They leave W unchanged.

Each acts on some matrices at once. A matrix has at most two generations of rows: those that are
written in the present coordinates, and the old ones; see `StackArrays`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.precision import product
from softsphere.matrix.segments import Segments
from softsphere.matrix.stack_arrays import StackArrays

__all__ = ["recompute_sums", "renew_coordinates", "rewrite_rows", "stack_directions"]


def stack_directions(U: Tensor) -> Tensor:
    """The rows of each U (k, w, w) made orthonormal, the longest first."""
    lengths = U.norm(dim=2)
    order = lengths.argsort(1, descending=True).unsqueeze(2).expand_as(U)
    ordered = (U / lengths.unsqueeze(2)).gather(1, order)
    return torch.empty_like(U).scatter_(1, order, torch.linalg.qr(ordered.mT).Q.mT)


def renew_coordinates(W: StackArrays, ids: Tensor, P: Tensor) -> None:
    """U_c ← P (k, w, w), whose rows are orthonormal; W is unchanged."""
    step = W.of("U", ids) @ P.mT
    new = ids[~W.has_map[ids]]
    with uninterrupted():
        W.begin_change()
        W.fold(ids)
        if W.maps is None:
            eye = torch.eye(W.width, dtype=torch.float64, device=W.device)
            W.maps = eye.repeat(W.count, 1, 1)
        local = W.local(ids)
        for piece in W.segments(new).pieces(W.width, W.V.chunk_size()):
            rows = piece.index if piece.real is None else piece.index[piece.real]
            W.old[rows.flatten()] = True
        mapped = ids[W.has_map[ids]]
        for piece in W.segments(mapped).pieces(W.width, W.V.chunk_size()):
            current = ~W.old[piece.index]
            if piece.real is not None:
                current &= piece.real
            which, place = current.nonzero(as_tuple=True)
            _carry(W, piece.index[which, place], step, local[piece.ids[which]])
        W.maps[ids] = W.maps[ids] @ step
        W.has_map[ids] = True
        _set_basis(W, ids, P)


def _carry(W: StackArrays, rows: Tensor, step: Tensor, which: Tensor) -> None:
    """Multiplies rows of V (n) by the maps step[which]."""
    V = W.V[rows]
    carried = V.clone()
    for piece in Segments.of(which).pieces(W.width):
        piece.put(product(piece.take(V), step[piece.ids]), carried)
    W.V[rows] = carried


def rewrite_rows(W: StackArrays, ids: Tensor, P: Tensor) -> None:
    """Writes all rows of some matrices for U_c = P (k, w, w) and ω_c = 0. O(w²) a row."""
    local = W.local(ids)
    with uninterrupted():
        W.begin_change()
        W.fold(ids)
        for piece in W.segments(ids).pieces(W.width, W.V.chunk_size()):
            V = W.V[piece.index.flatten()].view(*piece.index.shape, W.width)
            back = P[local[piece.ids]].mT
            step = W.of("U", piece.ids) @ back
            shift = (W.of("omega", piece.ids).unsqueeze(1) @ back).to(V.dtype)
            V = product(W.carried(piece.ids, V, W.old[piece.index]), step) + shift
            rows, values = piece.index.flatten(), V.flatten(0, 1)
            if piece.real is not None:
                rows, values = piece.index[piece.real], V[piece.real]
            W.V[rows] = values
            W.old[rows] = False
        W.has_map[ids] = False
        if W.maps is not None:
            W.maps[ids] = torch.eye(W.width, dtype=torch.float64, device=W.device)
        W.omega[ids] = 0.0
        _set_basis(W, ids, P)


def recompute_sums(W: StackArrays, ids: Tensor) -> None:
    """Computes G and w̄ of some matrices from their rows. O(w²) a row."""
    fresh = W.computed_sums(ids)
    with uninterrupted():
        W.fold(ids)
        W.centred_gram[ids], W.colsum[ids] = fresh


def _set_basis(W: StackArrays, ids: Tensor, P: Tensor) -> None:
    """Stores U_c = P and U_c⁻¹ = Pᵀ."""
    W.U[ids] = P
    W.U_inv[ids] = P.mT.contiguous()
