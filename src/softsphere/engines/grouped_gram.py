"""The statistics of the leaves of each row's cluster by one Gram matrix for each cluster.

With x_k = [w_k b_k] and the mean row x̄_c = Σ_k π_k x_k / n_c of a cluster of n_c leaves,

    Q_c = Σ_k π_k (x_k − x̄_c)(x_k − x̄_c)ᵀ,   μ = x̄_c · z,   s = n_c μ,   q = zᵀ Q_c z + n_c μ².

Taking the mean row off keeps the digits of q where the rows of a cluster have much in common. The
leaves are cut into blocks and the rows into tiles of fixed sizes, so that there is no loop over
clusters; PyTorch differentiates the products. A step costs 6 D w² + 6 n w² FLOPs for n rows of
width w, however many leaves a row's cluster has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere.engines.bfloat16_parts import number_of_parts
from softsphere.engines.grouping import Group, consecutive, portions, ranges
from softsphere.rounding import spread_of_equals

__all__ = ["cluster_statistics", "target_outputs_of"]

_BLOCK = 128
_TILE = 32


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
    X, z = W, Z
    if b is not None:
        X = torch.cat([W, b.unsqueeze(1)], 1)
        z = F.pad(Z, (0, 1), value=1.0)
    sizes = group.grouping.sizes.clamp_min(1).to(Z.dtype)
    of_leaf = group.grouping.cluster_of_leaf
    zeros = X.new_zeros(group.grouping.num_clusters, X.shape[1])
    mean = zeros.index_add(0, of_leaf, X * pi.unsqueeze(1)) / sizes.unsqueeze(1)
    Q = _gram((X - mean[of_leaf]) * pi.sqrt().unsqueeze(1), group)
    inner = _quadratic(z, Q, group)
    mu, n = (z * mean[group.cluster]).sum(1), sizes[group.cluster]
    with torch.no_grad():
        terms = Q.diagonal(dim1=1, dim2=2)[group.cluster]
        error = 3 * spread_of_equals(X.shape[1], Z.dtype) * (z * z * terms).sum(1)
    return n * mu, inner.clamp_min(0) + n * mu * mu, error


def target_outputs_of(Z: Tensor, W: Tensor, b: Tensor | None, target: Tensor) -> Tensor:
    """c = w_t · z + b_t of the target of each row: (n)."""
    c = (W.index_select(0, target) * Z).sum(1)
    return c if b is None else c + b.index_select(0, target)


def _gram(Y: Tensor, group: Group) -> Tensor:
    """Σ_k y_k y_kᵀ over the leaves of each cluster: (C, w, w)."""
    sizes, starts = group.grouping.sizes, group.grouping.starts
    cut = _Portions.of(sizes, starts[:-1], _BLOCK)
    blocks = Y[cut.place] * cut.valid.unsqueeze(2)
    w = Y.shape[1]
    return Y.new_zeros(len(sizes), w, w).index_add(0, cut.segment, blocks.mT @ blocks)


def _quadratic(z: Tensor, Q: Tensor, group: Group) -> Tensor:
    """zᵀ Q_c z of each row: (n)."""
    touched = group.touched
    cut = _Portions.of(touched.rows, touched.first_row, _TILE)
    tiles, Q = z[cut.place], Q[touched.cluster[cut.segment]]
    if number_of_parts(z, z.dtype):
        # a product that rounds Q would have an error in proportion to Σ_j z_j² Q_jj, not to q
        forms = ((tiles.double() @ Q.double()) * tiles).sum(2).to(z.dtype)
    else:
        forms = ((tiles @ Q) * tiles).sum(2)
    # the places of tiles are the rows in their order, with a gap at the end of each cluster
    within = torch.arange(len(z), device=z.device) - touched.first_row[touched.of_row]
    return forms.flatten().index_select(0, cut.first[touched.of_row] * _TILE + within)


@dataclass(frozen=True, eq=False)
class _Portions:
    """Consecutive segments, each cut into portions of `size` places.

    place: (N, size) the places of each portion; the last one of a segment repeats its end.
    valid: (N, size) whether each is inside the segment. segment: (N) the segment of each portion.
    first: the first portion of each segment.
    """

    place: Tensor
    valid: Tensor
    segment: Tensor
    first: Tensor

    @classmethod
    def of(cls, lengths: Tensor, starts: Tensor, size: int) -> _Portions:
        """lengths, starts: of each segment."""
        count = portions(lengths, size)
        total = int(count.sum())  # a GPU is waited for here alone
        segment = consecutive(count, total)
        begun = ranges(torch.zeros_like(count), count, total) * size
        within = begun.unsqueeze(1) + torch.arange(size, device=lengths.device)
        valid = within < lengths[segment].unsqueeze(1)
        place = starts[segment].unsqueeze(1) + within.minimum(lengths[segment].unsqueeze(1) - 1)
        return cls(place, valid, segment, count.cumsum(0) - count)
