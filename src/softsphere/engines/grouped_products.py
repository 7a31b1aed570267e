"""The outputs of the (row, leaf) pairs of a group: o_p = z_i · w_k, without any other output.

There is no loop over clusters. Where the clusters have few rows each, every pair is a dot product
(`F.embedding_bag` and its derivative are such products over lists of pairs). Where they have many,
the rows of a cluster are cut into tiles and its leaves into blocks of fixed sizes, and every tile
is multiplied with every block of its cluster in one batched product; places of tiles and blocks
that stay empty are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from softsphere._torch import pair_products
from softsphere.engines.grouping import Group, consecutive, ranges

__all__ = ["Tiles", "group_outputs"]

# With at least this many rows in a cluster on average, copying its leaves into blocks pays.
_MANY_ROWS = 8
_LARGEST_TILE, _LARGEST_BLOCK = 64, 256


def group_outputs(
    Z: Tensor, W: Tensor, b: Tensor | None, group: Group, *, sparse: bool = False
) -> Tensor:
    """The outputs z_i · w_k + b_k of all pairs of a group, as one vector.

    Args:
        Z: (n, d), the rows.
        W: (L, d), the weight of the leaves.
        b: (L) or None, their bias.
        group: which leaves each row needs.
        sparse: whether the gradient with respect to W is a sparse tensor of the leaves that are
            in clusters with rows. That with respect to b is always dense.

    Returns (P) in float32 or wider, differentiable once with respect to Z, W and b.
    """
    o: Tensor = _Outputs.apply(Z, W, b, group, sparse)  # type: ignore[no-untyped-call]
    return o


class _Outputs(torch.autograd.Function):
    """o (P) of Z (n, d), W (L, d) and b (L)."""

    @staticmethod
    def forward(
        ctx: Any, Z: Tensor, W: Tensor, b: Tensor | None, group: Group, sparse: bool
    ) -> Tensor:
        ctx.save_for_backward(Z, W, b)
        # kept for the backward, which needs the same tiles
        ctx.products, ctx.sparse = _products_of(group, W), sparse
        o: Tensor = ctx.products.outputs(Z, W)
        return o if b is None else o + b[group.leaf].to(o.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        Z, W, b = ctx.saved_tensors
        products, (needs_Z, needs_W, needs_b, *_) = ctx.products, ctx.needs_input_grad
        group = products.group
        dZ = products.rows_gradient(g, W).to(Z.dtype) if needs_Z else None
        dW = _spread(products.leaves_gradient(g, Z), group, W, ctx.sparse) if needs_W else None
        # dense: it is d times smaller, and PyTorch adds sparse vectors slowly
        db = _spread(_sums_of_leaves(g, group), group, b, False) if needs_b else None
        return dZ, dW, db, None, None


def _sums_of_leaves(g: Tensor, group: Group) -> Tensor:
    """The sums of the pairs of each leaf in the clusters with rows: (T)."""
    return g.new_zeros(group.touched.leaves).index_add_(0, group.slot, g)


def _spread(values: Tensor, group: Group, whole: Tensor, sparse: bool) -> Tensor:
    """A gradient of the shape of W or b, from its rows of the clusters with rows (T, …)."""
    leaves, values = group.grouping.leaves_of(group.touched.cluster), values.to(whole.dtype)
    if sparse:
        return torch.sparse_coo_tensor(
            leaves.unsqueeze(0), values, whole.shape, is_coalesced=True, check_invariants=False
        )
    if len(leaves) == len(whole):
        return values
    return torch.zeros_like(whole).index_copy_(0, leaves, values)


def _products_of(group: Group, W: Tensor) -> _Pairs | Tiles:
    """The way to multiply that suits the rows in each cluster, and the device."""
    rows = len(group.cluster) / max(1, len(group.touched.cluster))
    # the derivative of embedding_bag by its factors is in float32 and float64 alone
    few = rows < _MANY_ROWS and W.dtype in (torch.float32, torch.float64)
    return _Pairs(group) if few and W.device.type == "cpu" else Tiles.of(group)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Products pair by pair."""

    group: Group

    def outputs(self, Z: Tensor, W: Tensor) -> Tensor:
        group = self.group
        return pair_products(Z.to(W.dtype), W, group.row, group.leaf, group.offsets)

    def rows_gradient(self, g: Tensor, W: Tensor) -> Tensor:
        """∂z_i = Σ_k g_ik w_k: (n, d)."""
        group = self.group
        return F.embedding_bag(
            group.leaf, W, group.offsets, mode="sum", per_sample_weights=g.to(W.dtype)
        )

    def leaves_gradient(self, g: Tensor, Z: Tensor) -> Tensor:
        """∂w_k = Σ_i g_ik z_i of the leaves in the clusters with rows: (T, d)."""
        group, touched = self.group, self.group.touched
        total = group.pairs
        # The pairs leaf by leaf. Those of a cluster with r rows and k leaves are an (r, k) matrix
        # among the pairs row by row, which is transposed here.
        cluster = consecutive(touched.rows * touched.sizes, total)
        place = ranges(torch.zeros_like(touched.rows), touched.rows * touched.sizes, total)
        rows = touched.rows[cluster]
        leaf, row = place.div(rows, rounding_mode="floor"), place.remainder(rows)
        first = group.offsets[touched.first_row]
        source = first[cluster] + row * touched.sizes[cluster] + leaf
        counts = touched.rows.repeat_interleave(touched.sizes)
        return F.embedding_bag(
            touched.first_row[cluster] + row,
            Z.to(g.dtype),
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=g[source],
        )


@dataclass(frozen=True, eq=False)
class Tiles:
    """Products of tiles of rows with blocks of leaves.

    group: the pairs.
    rows: (N, R) the rows of the tile of each product; leaves: (N, B) those of its block. Places
        beyond the rows or leaves of the cluster repeat its last one.
    slots: (N, B) where each leaf stands among those of the clusters that have rows.
    pair: (P) where each pair stands among the N R B outputs.
    """

    group: Group
    rows: Tensor
    leaves: Tensor
    slots: Tensor
    pair: Tensor

    @classmethod
    def of(cls, group: Group) -> Tiles:
        touched, starts = group.touched, group.grouping.starts
        device = starts.device
        U = max(1, len(touched.cluster))
        R = _size_near(len(group.cluster) / U, _LARGEST_TILE)
        B = _size_near(int(touched.sizes.sum()) / U, _LARGEST_BLOCK)
        tiles, blocks = _portions(touched.rows, R), _portions(touched.sizes, B)
        items = tiles * blocks
        u = consecutive(items)
        item = ranges(torch.zeros_like(items), items)
        tile, block = item.div(blocks[u], rounding_mode="floor"), item.remainder(blocks[u])
        in_tile = _within(tile, R, touched.rows[u], device)
        in_block = _within(block, B, touched.sizes[u], device)
        slot = touched.first_leaf[u].unsqueeze(1) + in_block
        # the pair of row i and leaf k of the cluster u
        u_of_row = consecutive(touched.rows, len(group.cluster))
        i = torch.arange(len(group.cluster), device=device) - touched.first_row[u_of_row]
        t, r = i.div(R, rounding_mode="floor"), i.remainder(R)
        first = (items.cumsum(0) - items)[u_of_row] + t * blocks[u_of_row]
        k = ranges(torch.zeros_like(group.lengths), group.lengths, group.pairs)
        product = first[group.row] + k.div(B, rounding_mode="floor")
        pair = (product * R + r[group.row]) * B + k.remainder(B)
        return cls(
            group,
            touched.first_row[u].unsqueeze(1) + in_tile,
            starts[touched.cluster][u].unsqueeze(1) + in_block,
            slot,
            pair,
        )

    def outputs(self, Z: Tensor, W: Tensor) -> Tensor:
        dtype = _wide(W.dtype)
        every = torch.bmm(self._tiles(Z, dtype), self._blocks(W, dtype).mT)
        return every.flatten()[self.pair]

    def rows_gradient(self, g: Tensor, W: Tensor) -> Tensor:
        """∂z_i = Σ_k g_ik w_k: (n, d)."""
        products = torch.bmm(self._padded(g), self._blocks(W, g.dtype))
        out = g.new_zeros(len(self.group.cluster), W.shape[1])
        return out.index_add_(0, self.rows.flatten(), products.flatten(0, 1))

    def leaves_gradient(self, g: Tensor, Z: Tensor) -> Tensor:
        """∂w_k = Σ_i g_ik z_i of the leaves in the clusters with rows: (T, d)."""
        products = torch.bmm(self._padded(g).mT, self._tiles(Z, g.dtype))
        out = g.new_zeros(self.group.touched.leaves, Z.shape[1])
        return out.index_add_(0, self.slots.flatten(), products.flatten(0, 1))

    def _tiles(self, Z: Tensor, dtype: torch.dtype) -> Tensor:
        return Z.index_select(0, self.rows.flatten()).to(dtype).view(*self.rows.shape, Z.shape[1])

    def _blocks(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        return (
            W.index_select(0, self.leaves.flatten()).to(dtype).view(*self.leaves.shape, W.shape[1])
        )

    def _padded(self, g: Tensor) -> Tensor:
        """The gradients of the outputs (P) as (N, R, B), with 0 for places that stay empty."""
        (N, R), B = self.rows.shape, self.leaves.shape[1]
        return g.new_zeros(N * R * B).index_copy_(0, self.pair, g).view(N, R, B)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _size_near(mean: float, largest: int) -> int:
    """The power of two that is not below the mean, at most `largest`."""
    size = 1
    while size < mean and size < largest:
        size *= 2
    return size


def _portions(lengths: Tensor, size: int) -> Tensor:
    return (lengths + size - 1).div(size, rounding_mode="floor")


def _within(portion: Tensor, size: int, length: Tensor, device: torch.device) -> Tensor:
    """The places of portions (N) of a size, at most the last one of each length: (N, size)."""
    places = (portion * size).unsqueeze(1) + torch.arange(size, device=device)
    return places.minimum((length - 1).unsqueeze(1))
