"""The outputs of the rows of a group for the leaves of their clusters, without any other output.

They are laid out as `lines.Lines` says, and there is no loop over clusters. On a CPU, where the
clusters have few rows each, every output is a dot product (`F.embedding_bag` and its derivative are
such products over lists of pairs), which reads W where it is. Elsewhere the leaves of a cluster are
copied into blocks, which are multiplied with tiles of its rows in one batched product. The gradient
of W is always such a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere._torch import pair_products, transformed
from softsphere.engines.lines import Lines
from softsphere.engines.sparse_rows import refuse_second_derivatives

__all__ = ["group_outputs", "group_statistics"]

# With at least this many rows in a cluster on average, copying its leaves into blocks pays.
_MANY_ROWS = 16


def group_outputs(
    Z: Tensor, W: Tensor, b: Tensor | None, lines: Lines, *, sparse: bool = False
) -> Tensor:
    """The outputs z_i · w_k + b_k of all lines; 0 beyond the end of a cluster.

    Args:
        Z: (n, d), the rows.
        W: (L, d), the weight of the leaves.
        b: (L) or None, their bias.
        lines: which leaves each row needs.
        sparse: whether the gradient with respect to W is a sparse tensor of the leaves that are
            in clusters with rows. That with respect to b is always dense.

    Returns (N, B) in float32 or wider, differentiable with respect to Z, W and b any number of
    times, but once with a sparse gradient.
    """
    if transformed():
        return _multiplied(Z, W, b, lines)
    o: Tensor = _Outputs.apply(Z, W, b, lines, sparse)  # type: ignore[no-untyped-call]
    return o


def group_statistics(
    Z: Tensor, W: Tensor, b: Tensor | None, pi: Tensor, lines: Lines, *, sparse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """s = Σ π_k o_k and q = Σ π_k o_k² over the leaves of each row's cluster, and c = o_t.

    Args:
        pi: (L), the base measure, which has no gradient. For the others see `group_outputs`.

    Returns (n) each in float32 or wider, differentiable like the outputs.
    """
    if transformed():
        return _statistics_of(_multiplied(Z, W, b, lines), _weights(pi, lines), lines)
    s, q, c = _Statistics.apply(Z, W, b, pi, lines, sparse)  # type: ignore[no-untyped-call]
    return s, q, c


class _Outputs(torch.autograd.Function):
    """o (N, B) of Z (n, d), W (L, d) and b (L)."""

    @staticmethod
    def forward(
        ctx: Any, Z: Tensor, W: Tensor, b: Tensor | None, lines: Lines, sparse: bool
    ) -> Tensor:
        ctx.save_for_backward(Z, W, b)
        ctx.lines, ctx.sparse = lines, sparse
        return _outputs(Z, W, b, lines)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_gradients_in_graph(ctx, _multiplied, ctx.saved_tensors, (g,)), None, None
        return *_gradients(ctx, g.contiguous(), *ctx.saved_tensors), None, None


class _Statistics(torch.autograd.Function):
    """s, q and c (n) of Z (n, d), W (L, d) and b (L)."""

    @staticmethod
    def forward(
        ctx: Any, Z: Tensor, W: Tensor, b: Tensor | None, pi: Tensor, lines: Lines, sparse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        o = _outputs(Z, W, b, lines)
        weights = _weights(pi, lines)
        ctx.save_for_backward(Z, W, b, o, weights)
        ctx.lines, ctx.sparse = lines, sparse
        return _statistics_of(o, weights, lines)

    @staticmethod
    def backward(ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor) -> tuple[Tensor | None, ...]:
        *given, o, weights = ctx.saved_tensors
        lines = ctx.lines
        if torch.is_grad_enabled():

            def again(*inputs: Any) -> tuple[Tensor, ...]:
                return _statistics_of(_multiplied(*inputs), weights, lines)

            return *_gradients_in_graph(ctx, again, given, (gs, gq, gc)), None, None, None
        g = (o * lines.of_rows(2 * gq)).add_(lines.of_rows(gs)).mul_(weights)
        g.view(-1).index_add_(0, lines.own, gc.to(g.dtype))
        return *_gradients(ctx, g, *given), None, None, None


def _weights(pi: Tensor, lines: Lines) -> Tensor:
    """π in the layout of the outputs, 0 beyond the end of a cluster."""
    return lines.cleared(lines.spread(pi))


def _statistics_of(o: Tensor, weights: Tensor, lines: Lines) -> tuple[Tensor, Tensor, Tensor]:
    """s, q and c (n) of outputs (N, B), from weights that are 0 beyond the end of a cluster."""
    weighted = weights * o
    s, q = lines.sums_of_rows(weighted.sum(1)), lines.sums_of_rows((weighted * o).sum(1))
    return s, q, o.view(-1).index_select(0, lines.own)


def _gradients_in_graph(
    ctx: Any,
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    upstream: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients with respect to Z, W and b by plain operations, for second derivatives.

    Autograd cannot see into `_gradients`. It would take them for constants without a word, since
    it cuts what raises out of the graph where `torch.autograd.grad` names its inputs.

    function: takes Z, W, b and the lines to what was computed from them.
    """
    if ctx.sparse:
        refuse_second_derivatives()
    needs = ctx.needs_input_grad[:3]
    asked = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
    found = iter(
        torch.autograd.grad(function(*inputs, ctx.lines), asked, upstream, create_graph=True)
    )
    return tuple(next(found) if needed else None for needed in needs)


def _gradients(
    ctx: Any, g: Tensor, Z: Tensor, W: Tensor, b: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients with respect to Z, W and b, from those with respect to the outputs (N, B)."""
    lines, (needs_Z, needs_W, needs_b, *_) = ctx.lines, ctx.needs_input_grad
    dZ = _rows_gradient(g, W, lines).to(Z.dtype) if needs_Z else None
    dW = db = None
    if needs_W or needs_b:
        tiles = _tiles_of_lines(g, lines)
        dW = _weight_gradient(tiles, Z, W, lines, ctx.sparse) if needs_W else None
        db = _bias_gradient(tiles, b, lines) if b is not None and needs_b else None
    return dZ, dW, db


def _outputs(Z: Tensor, W: Tensor, b: Tensor | None, lines: Lines) -> Tensor:
    if _pair_by_pair(lines, W):
        row = lines.row.repeat_interleave(lines.size)
        pairs = pair_products(Z.to(W.dtype), W, row, lines.leaf, lines.offsets)
        o = pairs.view(-1, lines.size)
        if b is not None:
            o += lines.spread(b)
        return lines.cleared(o)
    return _multiplied(Z, W, b, lines)


def _multiplied(Z: Tensor, W: Tensor, b: Tensor | None, lines: Lines) -> Tensor:
    """The outputs (N, B) by products of tiles, through which autograd can go."""
    wide = _wide(W.dtype)
    every = torch.bmm(_rows_of_tiles(Z, lines).to(wide), _leaves_of_tiles(W, lines, wide).mT)
    o = every.flatten(0, 1).index_select(0, lines.tiles.line)
    if b is not None:
        # not in place, since torch.func.vmap may map over b alone
        o = o + lines.spread(b)
    return lines.cleared(o)


def _rows_gradient(g: Tensor, W: Tensor, lines: Lines) -> Tensor:
    """∂z_i = Σ_k g_ik w_k: (n, d)."""
    if _pair_by_pair(lines, W):
        weights = g.view(-1).to(W.dtype)
        return F.embedding_bag(lines.leaf, W, lines.offsets, mode="sum", per_sample_weights=weights)
    products = torch.bmm(_tiles_of_lines(g, lines), _leaves_of_tiles(W, lines, g.dtype))
    return lines.sums_of_rows(products.flatten(0, 1).index_select(0, lines.tiles.line))


def _weight_gradient(tiles: Tensor, Z: Tensor, W: Tensor, lines: Lines, sparse: bool) -> Tensor:
    """∂w_k = Σ_i g_ik z_i, from g in tiles: (L, d)."""
    V = len(lines.leaves)
    rows = _rows_of_tiles(Z, lines).to(tiles.dtype)
    values = torch.bmm(tiles[:V].mT, rows[:V])
    if len(rows) > V:
        values.index_add_(0, lines.tiles.further, torch.bmm(tiles[V:].mT, rows[V:]))
    values = values.flatten(0, 1).to(W.dtype)
    leaves = lines.leaves.flatten()
    if sparse:
        # a leaf that is repeated beyond the end of its cluster has a gradient of 0 there
        return torch.sparse_coo_tensor(
            leaves.unsqueeze(0),
            values,
            W.shape,
            is_coalesced=lines.padding is None,
            check_invariants=False,
        )
    if lines.padding is not None:
        # the row behind the last one takes what is beyond the end of a cluster
        leaves = torch.where(lines.padding.flatten(), len(W), leaves)
        return W.new_zeros(len(W) + 1, W.shape[1]).index_copy_(0, leaves, values)[:-1]
    if len(leaves) == len(W):
        return values
    return torch.zeros_like(W).index_copy_(0, leaves, values)


def _bias_gradient(tiles: Tensor, b: Tensor, lines: Lines) -> Tensor:
    """∂b_k = Σ_i g_ik, from g in tiles: (L)."""
    sums = tiles.sum(1).flatten()
    every = sums.new_zeros(b.shape).index_add_(0, _leaves_of_products(lines).flatten(), sums)
    return every.to(b.dtype)


def _pair_by_pair(lines: Lines, W: Tensor) -> bool:
    """Whether products of single pairs suit the rows in each cluster, and the device."""
    group = lines.group
    few = len(group.cluster) < _MANY_ROWS * len(group.touched.cluster) or not len(group.cluster)
    # the derivative of embedding_bag by its factors is in float32 and float64 alone
    return few and W.device.type == "cpu" and W.dtype in (torch.float32, torch.float64)


def _tiles_of_lines(x: Tensor, lines: Lines) -> Tensor:
    """Lines (N, B) as tiles (I, R, B), with 0 where a cluster has no more rows."""
    (count, R), B = lines.tiles.rows.shape, lines.size
    return x.new_zeros(count * R, B).index_copy_(0, lines.tiles.line, x).view(count, R, B)


def _rows_of_tiles(Z: Tensor, lines: Lines) -> Tensor:
    """The rows (n, d) as tiles (I, R, d)."""
    rows = lines.tiles.rows
    return Z.index_select(0, rows.flatten()).view(*rows.shape, Z.shape[1])


def _leaves_of_tiles(W: Tensor, lines: Lines, dtype: torch.dtype) -> Tensor:
    """The leaves (L, d) that each tile is multiplied with: (I, B, d)."""
    leaves = _leaves_of_products(lines)
    return W.index_select(0, leaves.flatten()).to(dtype).view(*leaves.shape, W.shape[1])


def _leaves_of_products(lines: Lines) -> Tensor:
    """The leaves of the block of each product: (I, B)."""
    leaves, further = lines.leaves, lines.tiles.further
    return torch.cat([leaves, leaves.index_select(0, further)]) if len(further) else leaves


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
