"""The engine "chunked": (s, q, c) of H Wᵀ + b in tiles of rows and classes.

Only one tile of outputs is in memory at a time. The backward computes the outputs again. Where a
GPU multiplies rows and classes of half precision as they are, the weight is not copied, and the
gradient of a tile is multiplied as the sum of two parts; not so for a loss that is invariant to a
shift of its outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.engines.engine import Engine, Gradients, Inputs, Settings, Workload
from softsphere.engines.operators import LinearOperator
from softsphere.engines.target_rows import TargetRows
from softsphere.engines.weight import add_target_rows, chunks, mean_row, read, target_outputs
from softsphere.half_products import in_parts, multiplies, product
from softsphere.rounding import above_rounding, error_of_sum, spread_of_equals

__all__ = ["CHUNKED", "tile"]

# Rows and classes of a tile: products of this size run at full speed whatever m, D and d are. A
# GPU, where each operation of a tile has to be launched, has fewer tiles, of 128 MiB in float32.
_ROWS, _CLASSES, _CLASSES_ON_GPU = 1024, 4096, 32_768


def tile(how: Settings, *, on_gpu: bool) -> tuple[int, int]:
    """Rows and classes of a tile; neither depends on m, D or d, so that none can shrink to one."""
    return how.row_chunk or _ROWS, how.class_chunk or (_CLASSES_ON_GPU if on_gpu else _CLASSES)


def _enter_as_they_are(x: Inputs, how: Settings) -> bool:
    """Whether H and W are multiplied in their own dtype, for outputs in that of the sums.

    Centred, W less its mean row is multiplied, since that has more digits than W has.
    """
    return not how.centred and x.H.dtype == x.W.dtype and multiplies(x.H, how.dtype)


def _classes(
    x: Inputs, part: slice, shift: Tensor | None, how: Settings
) -> tuple[Tensor, Tensor | None]:
    """Some rows of [W b] as they are multiplied."""
    w, w1 = x.W[part], None if x.b is None else x.b[part]
    if _enter_as_they_are(x, how):
        return w, None if w1 is None else w1.to(how.dtype)
    return read(w, w1, shift, how.dtype, None)


def _outputs(H: Tensor, x: Tensor, x1: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The outputs of rows H and classes [x x1], in dtype."""
    if H.dtype != dtype:
        o = product(H, x.mT, dtype)
        return o if x1 is None else o.add_(x1)
    return H @ x.mT if x1 is None else torch.addmm(x1, H, x.mT)


def _add_sizes(size: Tensor, x: Tensor, x1: Tensor | None, weight: Tensor | None) -> None:
    """size (d + 1) += Σ_k π_k |[x x1]_k|."""
    rows = x.abs()
    size[:-1] += rows.sum(0) if weight is None else weight @ rows
    if x1 is not None:
        size[-1] += (x1.abs() if weight is None else x1.abs() * weight).sum()


def _forward(x: Inputs, how: Settings) -> tuple[Tensor, ...]:
    """s, q, c, and for the backward the shift and what it has left of the mean output of a row.

    Centred, the shift is the mean row of [W b], rounded. What it leaves of the mean output is taken
    off by q − s²/M and c − s/M, where nothing large cancels.
    """
    _, W, b, _, pi = x
    rows, classes = tile(how, on_gpu=W.is_cuda)
    shift = mean_row(x, classes, how.dtype) if how.centred else None
    H = x.H if _enter_as_they_are(x, how) else x.H.to(how.dtype)
    s, q = (torch.zeros(len(H), dtype=how.dtype, device=H.device) for _ in range(2))
    size = s.new_zeros(W.shape[1] + 1)  # Σ_k π_k |[W b]_k|, of the rows as they are multiplied
    for part in chunks(len(W), classes):
        w, w1 = _classes(x, part, shift, how)
        weight = None if pi is None else pi[part].to(how.dtype)
        if how.centred:
            _add_sizes(size, w, w1, weight)
        for row in chunks(len(H), rows):
            o = _outputs(H[row], w, w1, how.dtype)
            s[row] += o.sum(1) if weight is None else o @ weight
            o.square_()
            q[row] += o.sum(1) if weight is None else o @ weight
    c = target_outputs(x, shift, how.dtype)
    if shift is None:
        return s, q, c, s.new_zeros(W.shape[1] + (b is not None)), torch.zeros_like(s)
    rest = s / x.mass
    size = (size / x.mass).to(how.dtype)
    apart = spread_of_equals(H.shape[1], how.dtype) * (H.abs() @ size[:-1] + size[-1])
    # the rounding errors of s and q, as in `is_rounding`
    apart = torch.maximum(apart, 2 * (3 * error_of_sum(len(W), how.dtype)) ** 0.5 * rest.abs())
    q = above_rounding((q - s * rest).clamp_min(0), apart, x.mass)
    return torch.zeros_like(s), q, c - rest.unsqueeze(1), shift, rest


def _backward(
    g: Gradients,
    x: Inputs,
    kept: tuple[Tensor, ...],
    how: Settings,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂H, ∂W and ∂b, with ∂o_k = π_k (g_s + 2 g_q o_k) and g_c at the targets."""
    H, W, b, target, pi = x
    shift, rest = kept if how.centred else (None, None)
    rows, classes = tile(how, on_gpu=W.is_cuda)
    base = g.s if rest is None else -g.c.sum(1) / x.mass - 2 * g.q * rest
    base, twice = base.to(how.dtype).unsqueeze(1), 2 * g.q.unsqueeze(1)
    factor = H if _enter_as_they_are(x, how) else H.to(how.dtype)
    dH = base.new_zeros(H.shape) if needs[0] else None
    dW = torch.empty_like(W) if needs[1] else None
    db = b.new_empty(b.shape, dtype=torch.float64) if needs[2] and b is not None else None
    targets = TargetRows(H, target, g.c)
    for part in chunks(len(W), classes):
        w, w1 = _classes(x, part, shift, how)
        weight = None if pi is None else pi[part].to(how.dtype)
        by_w, by_b = base.new_zeros(w.shape) if needs[1] else None, base.new_zeros(len(w))
        for row in chunks(len(H), rows):
            G = _outputs(factor[row], w, w1, how.dtype).mul_(twice[row]).add_(base[row])
            if weight is not None:
                G.mul_(weight)
            _add_products(G, factor[row], w, None if dH is None else dH[row], by_w)
            if db is not None:
                by_b += G.sum(0)
        if dW is not None and by_w is not None:
            targets.add_to(by_w, part, deterministic=how.deterministic)
            dW[part] = by_w
        if db is not None:
            db[part] = by_b
    if dH is not None:
        add_target_rows(dH, W, target, g.c, shift)
        dH = dH.to(H.dtype)
    if b is None or db is None:
        return dH, dW, None
    targets.add_to_bias(db, deterministic=how.deterministic)
    return dH, dW, db.to(b.dtype)


def _add_products(G: Tensor, H: Tensor, w: Tensor, dH: Tensor | None, by_w: Tensor | None) -> None:
    """dH += G w and by_w += Gᵀ H, where they are not None, of the gradient G of a tile."""
    if H.dtype == G.dtype:
        if dH is not None:
            torch.addmm(dH, G, w, out=dH)
        if by_w is not None:
            torch.addmm(by_w, G.mT, H, out=by_w)
        return
    parts = in_parts(G, H.dtype)
    if dH is not None:
        dH += parts.before(w, G.dtype)
    if by_w is not None:
        by_w += parts.mT.before(H, G.dtype)


def _cost(work: Workload) -> float:
    # two products of the outputs; and of their gradient two, or four where it is in parts
    halves = work.multiplies_halves and not work.centred
    products = 12 if halves else 8 * work.machine.float32
    return products * work.m * work.D * work.n + work.passes + work.target_rows


# kept: the shift (n) and the rest of the mean (m), both zero unless centred
_OPERATOR = LinearOperator("chunked", _forward, _backward, keeps=("n", "m"))
CHUNKED = Engine("chunked", _OPERATOR, _cost, chunks=("row_chunk", "class_chunk"))
