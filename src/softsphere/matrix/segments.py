"""Rows that belong to clusters, as padded batches, so that no loop runs over clusters.

The rows of a cluster are consecutive, perhaps after a permutation. Clusters of similar size are
padded to the same number of rows: the sizes of a batch lie between two powers of two, so at most
half of it is padding, and n rows need at most log₂ n batches, which are cut to some MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Piece", "Segments"]

# The size of the matrices, one a cluster, that are gathered at once.
_GATHERED_BYTES = 8 << 20


@dataclass(frozen=True)
class Piece:
    """Some clusters and rows of theirs.

    ids: (k) the clusters
    index: (k, p) the rows of each; padding repeats one of its rows
    real: (k, p) which of them are rows and not padding; None if all are
    """

    ids: Tensor
    index: Tensor
    real: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """Gathers values (n, …) of the rows, with zeros as padding: (k, p, …)."""
        taken = values[self.index]
        if self.real is None:
            return taken
        # not a product, which would keep the NaN of a row in its padding
        mask = self.real.reshape(*self.real.shape, *[1] * (values.dim() - 1))
        return torch.where(mask, taken, torch.zeros((), dtype=taken.dtype, device=taken.device))

    def put(self, values: Tensor, into: Tensor) -> None:
        """Writes values (k, p, …) of the rows into a tensor (n, …), without the padding."""
        if self.real is None:
            into.index_copy_(0, self.index.flatten(), values.flatten(0, 1))
        else:
            into.index_copy_(0, self.index[self.real], values[self.real])


@dataclass(frozen=True)
class Segments:
    """The rows of each of some clusters: order[start … start + size − 1].

    ids: (g) the clusters, each once
    starts, sizes: (g)
    order: (n) a permutation, or None if the rows are in order
    """

    ids: Tensor
    starts: Tensor
    sizes: Tensor
    order: Tensor | None = None

    @classmethod
    def of(cls, cluster: Tensor) -> Segments:
        """Returns the segments of rows whose clusters (n) are given in any order."""
        ordered, order = cluster.sort(stable=True)
        ids, sizes = ordered.unique_consecutive(return_counts=True)
        return cls(ids, sizes.cumsum(0) - sizes, sizes, order)

    def pieces(self, width: int, longest: int | None = None) -> Iterator[Piece]:
        """Yields batches that cover every row once; empty clusters are left out.

        Args:
            width: w; a w × w matrix in float64 of each cluster of a piece takes some MiB in all.
            longest: about the most rows of a piece, if a cluster may be cut.
        """
        most = max(1, _GATHERED_BYTES // (8 * width * width))
        level = torch.where(self.sizes > 0, self.sizes.double().log2().floor(), -1.0)
        for each in level.unique().tolist():
            if each < 0:
                continue
            chosen = (level == each).nonzero().squeeze(1)
            length = int(self.sizes[chosen].max())
            count = most if longest is None else min(most, max(1, longest // length))
            for some in chosen.split(count):
                for start in range(0, length, longest or length):
                    yield self._piece(some, start, min(length, start + (longest or length)))

    def _piece(self, some: Tensor, start: int, stop: int) -> Piece:
        offset = torch.arange(start, stop, device=some.device)
        sizes = self.sizes[some].unsqueeze(1)
        real = offset < sizes
        index = self.starts[some].unsqueeze(1) + torch.minimum(offset, sizes - 1)
        if self.order is not None:
            index = self.order[index]
        return Piece(self.ids[some], index, None if bool(real.all()) else real)
