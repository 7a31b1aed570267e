"""The statistics of the leaves of each row's cluster by one Gram matrix for each cluster.

With x_k = [w_k b_k] and the mean row x̄_c = Σ_k π_k x_k / n_c of a cluster of n_c leaves,

    Q_c = Σ_k π_k (x_k − x̄_c)(x_k − x̄_c)ᵀ,   μ = x̄_c · z,   s = n_c μ,   q = zᵀ Q_c z + n_c μ².

Taking the mean row off keeps the digits of q where the rows of a cluster have much in common. The
leaves of the clusters that have rows are cut into blocks, and the rows into tiles, so that there is
no loop over clusters; PyTorch differentiates the products. A step costs 6 T w² + 6 n w² FLOPs for n
rows of width w and the T leaves of their clusters, however many leaves a row's cluster has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere.engines.bfloat16_parts import number_of_parts
from softsphere.engines.grouping import Group, Touched, consecutive, in_one_wait, portions, ranges
from softsphere.rounding import spread_of_equals

__all__ = ["cluster_statistics", "places", "target_outputs_of"]

# The most leaves of a block and rows of a tile, and the fewest where clusters have more.
_BLOCK, _TILE, _FEWEST = 128, 32, 16


def cluster_statistics(
    Z: Tensor, W: Tensor, b: Tensor | None, pi: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """s, q and the errors that rounding may have left in q, (n) each.

    Args:
        Z: (n, d), the rows, in the dtype of the computation.
        W, b: (L, d) and (L) or None, the weight and the bias of the leaves, in that dtype.
        pi: (L), the base measure; Σ π over a cluster is its number of leaves.
        group: the cluster of each row.
    """
    touched = group.touched
    blocks, tiles = _portions(touched)
    z = Z if b is None else F.pad(Z, (0, 1), value=1.0)
    sizes = touched.sizes.to(Z.dtype)
    mean, Q = _moments(W, b, pi, sizes, blocks)
    inner = _quadratic(z, Q, touched, tiles)
    of_row = touched.of_row
    mu, n = (z * mean.index_select(0, of_row)).sum(1), sizes.index_select(0, of_row)
    with torch.no_grad():
        terms = Q.diagonal(dim1=1, dim2=2).index_select(0, of_row)
        error = 3 * spread_of_equals(z.shape[1], Z.dtype) * (z * z * terms).sum(1)
    return n * mu, inner.clamp_min(0) + n * mu * mu, error


def target_outputs_of(Z: Tensor, W: Tensor, b: Tensor | None, target: Tensor) -> Tensor:
    """c = w_t · z + b_t of the target of each row: (n)."""
    c = (W.index_select(0, target) * Z).sum(1)
    return c if b is None else c + b.index_select(0, target)


def places(
    clusters: int, leaves: int, largest: int, rows: int, most_rows: int
) -> tuple[float, float]:
    """About how many places the leaves have in their blocks, and the rows in their tiles.

    Args:
        clusters: U, those that have rows.
        leaves, rows: how many they have together.
        largest, most_rows: the largest numbers of leaves and of rows that one of them has.
    """
    return _places(leaves, clusters, largest, _BLOCK), _places(rows, clusters, most_rows, _TILE)


def _moments(
    W: Tensor, b: Tensor | None, pi: Tensor, sizes: Tensor, blocks: _Portions
) -> tuple[Tensor, Tensor]:
    """x̄_c (U, w) and Q_c (U, w, w) of the clusters with rows."""
    X = blocks.of(W)
    if b is not None:
        X = torch.cat([X, blocks.of(b.unsqueeze(1))], 2)
    weights = (blocks.of(pi.unsqueeze(1)) * blocks.valid.unsqueeze(2)).to(X.dtype)
    mean = blocks.sums((X * weights).sum(1)) / sizes.unsqueeze(1)
    Y = (X - blocks.spread(mean).unsqueeze(1)) * weights.sqrt()
    return mean, blocks.sums(Y.mT @ Y)


def _quadratic(z: Tensor, Q: Tensor, touched: Touched, cut: _Portions) -> Tensor:
    """zᵀ Q_c z of each row: (n)."""
    tiles, Q = cut.of(z), cut.spread(Q)
    if number_of_parts(z, z.dtype):
        # a product that rounds Q would have an error in proportion to Σ_j z_j² Q_jj, not to q
        forms = ((tiles.double() @ Q.double()) * tiles).sum(2).to(z.dtype)
    else:
        forms = ((tiles @ Q) * tiles).sum(2)
    # the places of tiles are the rows in their order, with a gap at the end of each cluster
    of_row = touched.of_row
    first = cut.first * tiles.shape[1] - touched.first_row
    places = first.index_select(0, of_row) + torch.arange(len(z), device=z.device)
    return forms.flatten().index_select(0, places)


@dataclass(frozen=True, eq=False)
class _Portions:
    """The leaves or the rows of the U clusters with rows, each cut into portions of `size` places.

    place: (N, size) the places of each portion; the last one of a cluster repeats its end.
    valid: (N, size) whether each is inside the cluster. cluster: (N) which of the U it is of.
    first: (U) the first portion of each cluster.
    """

    place: Tensor
    valid: Tensor
    cluster: Tensor
    first: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Values x (…, k) in portions: (N, size, k)."""
        return x.index_select(0, self.place.flatten()).view(*self.place.shape, x.shape[1])

    def sums(self, x: Tensor) -> Tensor:
        """The sums of values of portions (N, …) in each cluster: (U, …)."""
        if len(x) == len(self.first):
            return x
        return x.new_zeros(len(self.first), *x.shape[1:]).index_add(0, self.cluster, x)

    def spread(self, x: Tensor) -> Tensor:
        """The value x (U, …) of its cluster for each portion: (N, …)."""
        return x if len(self.place) == len(x) else x.index_select(0, self.cluster)


def _portions(touched: Touched) -> tuple[_Portions, _Portions]:
    """The blocks of leaves and the tiles of rows."""
    U, n = len(touched.cluster), len(touched.of_row)
    block = _portion(touched.leaves, U, touched.largest, _BLOCK)
    tile = _portion(n, U, touched.most_rows, _TILE)
    blocks, tiles = portions(touched.sizes, block), portions(touched.rows, tile)
    V, N = in_one_wait(blocks.sum(), tiles.sum())
    return (
        _cut(touched.sizes, touched.starts, blocks, V, block),
        _cut(touched.rows, touched.first_row, tiles, N, tile),
    )


def _cut(lengths: Tensor, starts: Tensor, count: Tensor, total: int, size: int) -> _Portions:
    """Segments as `total` portions: count of each, of `size` places.

    lengths, starts: of each segment.
    """
    segment = consecutive(count, total)
    begun = ranges(torch.zeros_like(count), count, total) * size
    within = begun.unsqueeze(1) + torch.arange(size, device=lengths.device)
    length = lengths.index_select(0, segment).unsqueeze(1)
    place = starts.index_select(0, segment).unsqueeze(1) + within.minimum(length - 1)
    return _Portions(place, within < length, segment, count.cumsum(0) - count)


def _portion(total: int, clusters: int, largest: int, most: int) -> int:
    """The places of a portion: at most about twice the mean, and the largest cluster is full."""
    mean = total // max(1, clusters)
    number = -(-largest // min(most, max(_FEWEST, 2 * mean)))
    return max(1, -(-largest // max(1, number)))


def _places(total: int, clusters: int, largest: int, most: int) -> float:
    """About how many places all portions have: one portion for each cluster, or more."""
    size = _portion(total, clusters, largest, most)
    if largest <= size:
        return clusters * size
    return max(clusters * size, total + clusters * (size - 1) / 2)
