"""How the classes of a clustered layer are grouped, and which of them the rows of a batch need.

A class is in the shortlist or in one of C clusters. The leaves are the classes that are in a
cluster, in the order in which their rows of the weight are stored: cluster by cluster. A row whose
target is in cluster c needs the outputs of all leaves of c, and no others. These (row, leaf) pairs
are numbered row by row, so that the outputs of a batch are one vector without any padding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Group", "Grouping", "consecutive", "ranges"]


def consecutive(lengths: Tensor, total: int | None = None) -> Tensor:
    """The number of the segment that each of Σ lengths places is in: 0, 0, 1, 2, 2, 2, …"""
    segments = torch.arange(len(lengths), device=lengths.device)
    return segments.repeat_interleave(lengths, output_size=total)


def ranges(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """start, start + 1, … of every segment, one after another: (Σ lengths)."""
    first = starts - (lengths.cumsum(0) - lengths)
    shifted = first.repeat_interleave(lengths, output_size=total)
    return shifted + torch.arange(len(shifted), device=lengths.device)


@dataclass(frozen=True, eq=False)
class Grouping:
    """The shortlist and the clusters of D classes.

    cluster: (D) the cluster of each class, or −1 for the shortlist.
    place: (D) where a class stands in the shortlist, or among the leaves.
    shortlist: (S) the classes of the shortlist.
    leaves: (D − S) the other classes, cluster by cluster, each in ascending order.
    starts: (C + 1) the first leaf of each cluster, and the number of leaves.
    """

    cluster: Tensor
    place: Tensor
    shortlist: Tensor
    leaves: Tensor
    starts: Tensor

    @classmethod
    def of(cls, assignment: Tensor) -> Grouping:
        """The grouping by the cluster of each class, (D) integers of at least −1."""
        cluster = assignment.long()
        C = int(cluster.max()) + 1
        order = cluster.argsort(stable=True)
        sizes = torch.bincount(cluster + 1, minlength=C + 1)
        S = int(sizes[0])
        shortlist, leaves = order[:S], order[S:]
        place = torch.empty_like(cluster)
        place[shortlist] = torch.arange(S, device=place.device)
        place[leaves] = torch.arange(len(leaves), device=place.device)
        starts = torch.cat([sizes.new_zeros(1), sizes[1:].cumsum(0)])
        return cls(cluster, place, shortlist, leaves, starts)

    @property
    def num_clusters(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def sizes(self) -> Tensor:
        """(C) the number of classes of each cluster."""
        return self.starts.diff()

    @cached_property
    def cluster_of_leaf(self) -> Tensor:
        """(D − S) the cluster of each leaf."""
        return consecutive(self.sizes, len(self.leaves))

    @cached_property
    def largest(self) -> int:
        """The number of classes of the largest cluster, 0 without clusters."""
        return int(self.sizes.max()) if self.num_clusters else 0

    @cached_property
    def has_empty(self) -> bool:
        """Whether there are clusters without any class."""
        return bool((self.sizes == 0).any())

    def base_measure(self, counts: Tensor) -> Tensor:
        """π of the leaves (L) by counts (D): its sum over a cluster is its number of classes."""
        own = counts[self.leaves]
        return own * (self.sizes / self._sums(own))[self.cluster_of_leaf]

    def root_shares(self, counts: Tensor) -> Tensor:
        """The share of counts (D) of every class of the shortlist and every cluster: (S + C)."""
        sums = self._sums(counts[self.leaves])
        return torch.cat([counts[self.shortlist], sums]) / counts.sum()

    def _sums(self, own: Tensor) -> Tensor:
        """The sum of the leaves (L) of each cluster: (C)."""
        return own.new_zeros(self.num_clusters).index_add_(0, self.cluster_of_leaf, own)

    def root_entry(self, classes: Tensor) -> Tensor:
        """Where the root scores each class, or its cluster: the shortlist comes first."""
        cluster = self.cluster[classes]
        return torch.where(cluster < 0, self.place[classes], cluster + len(self.shortlist))

    def leaves_of(self, clusters: Tensor) -> Tensor:
        """The leaves of the given clusters, one cluster after another."""
        return ranges(self.starts[clusters], self.sizes[clusters])

    def group(self, cluster: Tensor, place: Tensor) -> tuple[Tensor, Group]:
        """The rows whose cluster (m) is not −1, in the order of their clusters, and their group.

        place: (m) the target of each row among the leaves.
        """
        rows = (cluster >= 0).nonzero().squeeze(1)
        rows = rows[cluster[rows].argsort(stable=True)]
        return rows, Group(cluster[rows], place[rows], self)

    def to(self, device: torch.device) -> Grouping:
        """The same on a device."""
        if self.cluster.device == device:
            return self
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Group:
    """Rows in the order of their clusters, each with a leaf of its cluster as its target.

    cluster: (n) the cluster of each row, ascending.
    target: (n) the target among the leaves.
    grouping: the clusters.
    """

    cluster: Tensor
    target: Tensor
    grouping: Grouping

    def part(self, rows: slice) -> Group:
        """Some of the rows."""
        return Group(self.cluster[rows], self.target[rows], self.grouping)

    @cached_property
    def lengths(self) -> Tensor:
        """(n) how many leaves each row needs."""
        return self.grouping.sizes[self.cluster]

    @cached_property
    def offsets(self) -> Tensor:
        """(n) the first pair of each row."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def pairs(self) -> int:
        """P, the number of pairs."""
        return int(self.lengths.sum())

    @cached_property
    def row(self) -> Tensor:
        """(P) the row of each pair."""
        return consecutive(self.lengths, self.pairs)

    @cached_property
    def leaf(self) -> Tensor:
        """(P) the leaf of each pair."""
        return ranges(self.grouping.starts[self.cluster], self.lengths, self.pairs)

    @cached_property
    def own(self) -> Tensor:
        """(n) the pair of each row with its target."""
        return self.offsets + self.target - self.grouping.starts[self.cluster]

    @cached_property
    def slot(self) -> Tensor:
        """(P) where the leaf of each pair stands among those of the clusters that have rows."""
        touched = self.touched
        of_row = consecutive(touched.rows, len(self.cluster))
        return ranges(touched.first_leaf[of_row], self.lengths, self.pairs)

    @cached_property
    def touched(self) -> Touched:
        """The clusters that have rows."""
        return Touched.by(self)


@dataclass(frozen=True, eq=False)
class Touched:
    """The U clusters that have rows in a group.

    cluster: (U) which they are.
    rows: (U) how many rows each has; first_row: (U) the first of them.
    sizes: (U) how many leaves each has; first_leaf: (U) the first of them among those of all U.
    """

    cluster: Tensor
    rows: Tensor
    first_row: Tensor
    sizes: Tensor
    first_leaf: Tensor

    @classmethod
    def by(cls, group: Group) -> Touched:
        cluster, rows = torch.unique_consecutive(group.cluster, return_counts=True)
        sizes = group.grouping.sizes[cluster]
        return cls(cluster, rows, rows.cumsum(0) - rows, sizes, sizes.cumsum(0) - sizes)

    @cached_property
    def leaves(self) -> int:
        """T, how many leaves they have together."""
        return int(self.sizes.sum())
