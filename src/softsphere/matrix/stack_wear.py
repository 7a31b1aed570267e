"""Measures the numerical condition of the factors of a stack of matrices, without changing them.

The measures are those of `wear`, of many matrices at once. W_c has one block of columns, so its
units do not matter to κ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsphere.matrix.stack_arrays import StackArrays
from softsphere.matrix.wear import Health, probes_of, tolerance

__all__ = ["measures", "square_conditions", "stack_gram_drift", "stack_health"]


def square_conditions(U: Tensor, U_inv: Tensor) -> Tensor:
    """κ² of each matrix: (k)."""
    amplified: Tensor = U.norm(dim=2) * U_inv.norm(dim=1)
    return amplified.square().mean(1)


def measures(W: StackArrays, ids: Tensor, seed: int = 0) -> Tensor:
    """κ², the drift of U⁻¹ in tolerances, the share of 1 ωᵀ and the length of U's rows: (k, 4)."""
    U, U_inv = W.of("U", ids), W.of("U_inv", ids)
    lengths = U.norm(dim=2, keepdim=True)
    z = probes_of(W.width, 2, seed, W.device)
    drift = (U @ (U_inv @ (z * lengths)) / lengths - z).norm(dim=(1, 2)) / z.norm()
    spread = W.centred_gram.diagonal(dim1=1, dim2=2)[ids].sum(1) * W.scale[ids].square()
    squares = spread.clamp_min(0) + W.of("colsum", ids).square().sum(1) / W.mass[ids]
    shift = W.of("omega", ids).square().sum(1) * W.mass[ids]
    reach = lengths.squeeze(2).log2().abs().amax(1).clamp_max(1000.0)
    each = (
        square_conditions(U, U_inv),
        drift / tolerance(W),
        (shift / squares.clamp_min(1e-300)).sqrt(),
        2.0**reach,
    )
    return torch.stack(each, 1)


def stack_gram_drift(W: StackArrays, ids: Tensor, probes: int = 1, seed: int = 0) -> Tensor:
    """The largest relative error of xᵀG_c x against ‖W_c x‖² under Π, over random x: (k).

    O(w probes) a row. A difference as small as the rounding of V can make does not count.
    """
    x = probes_of(W.width, probes, seed, W.device)
    mean, mass = W.mean(ids), W.mass[ids].unsqueeze(1)
    common = mean @ x
    squares, rest = torch.zeros_like(common), torch.zeros_like(common)
    local = W.local(ids)
    for piece in W.segments(ids).pieces(W.width, W.V.chunk_size()):
        at = local[piece.ids]
        V = W.V[piece.index.flatten()].view(*piece.index.shape, W.width).double()
        through = W.of("U", piece.ids) @ x
        outputs = V @ through
        if W.maps is not None:
            old = W.old[piece.index].unsqueeze(2)
            outputs = torch.where(old, V @ (W.maps[piece.ids] @ through), outputs)
        shifted = outputs + (W.of("omega", piece.ids) @ x - common[at]).unsqueeze(1)
        if piece.real is not None:
            shifted.masked_fill_(~piece.real.unsqueeze(2), 0.0)
        weighted = shifted if W.pi is None else shifted * W.pi[piece.index].unsqueeze(2)
        squares.index_add_(0, at, (weighted * shifted).sum(1))
        rest.index_add_(0, at, weighted.sum(1))
    exact = squares - rest.square() / mass
    kept = (x * (W.of("centred_gram", ids) @ x)).sum(1)
    unseen = mass * (torch.finfo(W.dtype).eps * (mean.abs() @ x.abs())).square()
    return ((kept - exact).abs() / (exact + unseen).clamp_min(1e-300)).amax(1)


def stack_health(W: StackArrays, probes: int, seconds: float, done: dict[str, int]) -> Health:
    """Measures all matrices and returns the worst of each measure.

    `done` counts by name what was mended, in `seconds`.
    """
    ids = W.all_ids()[W.sizes > 0]
    most, drift = torch.zeros(4, dtype=torch.float64, device=W.device), math.nan
    for some in W.split(ids):
        most = torch.maximum(most, measures(W, some).amax(0))
    if probes and len(ids):
        drift = float(stack_gram_drift(W, ids, probes).max())
    return Health(
        condition=math.sqrt(float(most[0])),
        inverse_drift=float(most[1]) * tolerance(W),
        gram_drift=drift,
        shift=float(most[2]),
        generations=1 + int(bool(W.old.any())),
        seconds=seconds,
        **done,
    )
