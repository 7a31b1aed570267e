"""Rows that belong to clusters, as padded batches, so that no loop runs over clusters.

The rows of a cluster are consecutive, perhaps after a permutation. Clusters of similar size are
padded to the same number of rows: those of a batch lie between two powers of four, so that n rows
need at most log₄ n batches. Batches are cut so that matrices which are gathered for them, one for
each cluster, stay in the cache of a processor, or take some MiB of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Piece", "Segments"]

# The size of the matrices, one a cluster, that are gathered at once: on a CPU about that of its
# cache, on a GPU so large that few pieces are launched.
_GATHERED_BYTES, _GATHERED_BYTES_ON_GPU = 4 << 20, 64 << 20


@dataclass(frozen=True)
class Piece:
    """Some clusters and rows of theirs.

    ids: (k) the clusters
    index: (k, p) the rows of each; padding repeats one of its rows
    real: (k, p) which of them are rows and not padding; None if all are
    places: their places among the k p; None if all are
    """

    ids: Tensor
    index: Tensor
    real: Tensor | None
    places: Tensor | None

    @cached_property
    def flat(self) -> Tensor:
        """The index in one dimension."""
        return self.index.flatten()

    def take(self, values: Tensor) -> Tensor:
        """Gathers values (n, …) of the rows, with zeros as padding: (k, p, …)."""
        # faster than values[index]
        taken = values.index_select(0, self.flat).view(*self.index.shape, *values.shape[1:])
        if self.real is None:
            return taken
        # not a product, which would keep the NaN of a row in its padding
        mask = self.real.reshape(*self.real.shape, *[1] * (values.dim() - 1))
        return torch.where(mask, taken, torch.zeros((), dtype=taken.dtype, device=taken.device))

    def put(self, values: Tensor, into: Tensor) -> None:
        """Writes values (k, p, …) of the rows into a tensor (n, …), without the padding."""
        rows, values = self.flat, values.flatten(0, 1)
        if self.places is not None:
            rows, values = (x.index_select(0, self.places) for x in (rows, values))
        into.index_copy_(0, rows, values)


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

    @cached_property
    def _read_sizes(self) -> Tensor:
        """The sizes on the CPU. A GPU is waited for here, and nowhere else for all pieces."""
        return self.sizes.cpu()

    def pieces(self, width: int, longest: int | None = None) -> Iterator[Piece]:
        """Yields batches that cover every row once; empty clusters are left out.

        Args:
            width: w, of which a w × w matrix in float64 is gathered for each cluster.
            longest: about the most rows of a piece, if a cluster may be cut.
        """
        on_cpu = self.sizes.device.type == "cpu"
        gathered = _GATHERED_BYTES if on_cpu else _GATHERED_BYTES_ON_GPU
        most = max(1, gathered // (8 * width * width))
        sizes = self._read_sizes
        level = torch.where(sizes > 0, (sizes.double().log2() / 2).floor(), -1.0)
        for each in level.unique().tolist():
            if each < 0:
                continue
            chosen = (level == each).nonzero().squeeze(1)
            length = int(sizes[chosen].max())
            count = most if longest is None else min(most, max(1, longest // length))
            for some in chosen.split(count):
                for start in range(0, length, longest or length):
                    yield self._piece(some, start, min(length, start + (longest or length)))

    def _piece(self, some: Tensor, start: int, stop: int) -> Piece:
        """A piece with the rows start … stop − 1 of some clusters, whose numbers are on the CPU."""
        sizes = self._read_sizes[some].unsqueeze(1)
        real = torch.arange(start, stop, device=sizes.device) < sizes
        padded = not bool(real.all())
        places = self._sent(real.flatten().nonzero().squeeze(1)) if padded else None
        some = self._sent(some)
        offset = torch.arange(start, stop, device=some.device)
        last = self.sizes[some].unsqueeze(1) - 1
        index = self.starts[some].unsqueeze(1) + torch.minimum(offset, last)
        if self.order is not None:
            index = self.order[index]
        return Piece(self.ids[some], index, self._sent(real) if padded else None, places)

    def _sent(self, x: Tensor) -> Tensor:
        """x on the device of the segments, which is not waited for."""
        return x.to(self.sizes.device, non_blocking=True)
