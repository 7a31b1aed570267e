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
import torch.nn.functional as F
from torch import Tensor

from softsphere._torch import integers, untraced

__all__ = ["Group", "Grouping", "consecutive", "in_one_wait", "portions", "ranges"]


def consecutive(lengths: Tensor, total: int | None = None) -> Tensor:
    """The number of the segment that each of Σ lengths places is in: 0, 0, 1, 2, 2, 2, …"""
    segments = torch.arange(len(lengths), device=lengths.device)
    return segments.repeat_interleave(lengths, output_size=total)


def ranges(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """start, start + 1, … of every segment, one after another: (Σ lengths)."""
    first = starts - (lengths.cumsum(0) - lengths)
    shifted = first.repeat_interleave(lengths, output_size=total)
    return shifted + torch.arange(len(shifted), device=lengths.device)


def portions(lengths: Tensor, size: int) -> Tensor:
    """How many portions of a size segments have."""
    return (lengths + (size - 1)).div(size, rounding_mode="floor")


def in_one_wait(*numbers: Tensor) -> list[int]:
    """The values of integers (), for which a GPU is waited for once."""
    return integers(torch.stack(numbers))


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
    @untraced
    def sizes(self) -> Tensor:
        """(C) the number of classes of each cluster."""
        return self.starts.diff()

    @cached_property
    @untraced
    def cluster_of_leaf(self) -> Tensor:
        """(D − S) the cluster of each leaf."""
        return consecutive(self.sizes, len(self.leaves))

    @cached_property
    @untraced
    def largest(self) -> int:
        """The number of classes of the largest cluster, 0 without clusters."""
        return int(self.sizes.max()) if self.num_clusters else 0

    @cached_property
    @untraced
    def has_empty(self) -> bool:
        """Whether there are clusters without any class."""
        return bool((self.sizes == 0).any())

    @cached_property
    @untraced
    def _undecided(self) -> Tensor | None:
        """Whether each cluster (C), and a last one, which −1 names, has classes to choose from.

        None if all have.
        """
        several = self.sizes > 1
        return None if bool(several.all()) else torch.cat([several, several.new_zeros(1)])

    def base_measure(self, counts: Tensor) -> Tensor:
        """π of the leaves (L) by counts (D): its sum over a cluster is its number of classes."""
        return self.normalised(counts[self.leaves])

    def normalised(self, own: Tensor) -> Tensor:
        """Positive numbers of the leaves (L), scaled to a sum of one a class in every cluster."""
        return own * (self.sizes / self._sums(own))[self.cluster_of_leaf]

    def error_of_measure(self, pi: Tensor) -> float:
        """How far sums of π (L) over clusters are from one a class, at most; NaN if one is."""
        sizes = self.starts.diff()
        # differences of sums, so that nothing of the size of L is kept
        sums = torch.cat([pi.new_zeros(1).double(), pi.double().cumsum(0)])[self.starts].diff()
        return float((sums / sizes.clamp_min(1) - 1)[sizes > 0].abs().max())

    def root_shares(self, counts: Tensor) -> Tensor:
        """The share of counts (D) of every class of the shortlist and every cluster: (S + C)."""
        sums = self._sums(counts[self.leaves])
        return torch.cat([counts[self.shortlist], sums]) / counts.sum()

    def _sums(self, own: Tensor) -> Tensor:
        """The sum of the leaves (L) of each cluster: (C)."""
        return own.new_zeros(self.num_clusters).index_add_(0, self.cluster_of_leaf, own)

    def root_entry(self, cluster: Tensor, place: Tensor) -> Tensor:
        """Where the root scores classes (n), or their clusters: the shortlist comes first.

        cluster, place: of each class.
        """
        return torch.where(cluster < 0, place, cluster + len(self.shortlist))

    def leaves_of(self, clusters: Tensor) -> Tensor:
        """The leaves of the given clusters, one cluster after another."""
        return ranges(self.starts[clusters], self.sizes[clusters])

    def group(self, cluster: Tensor, place: Tensor) -> tuple[Tensor, Group]:
        """The rows whose cluster (m) is not −1, in the order of their clusters, and their group.

        The only class of a cluster has the probability 1 in it, whatever its row of the weight is.
        Rows with such a cluster are left out, since their loss in it would be a difference of
        numbers that need not be equal where sums are kept in factors.

        place: (m) the target of each row among the leaves.
        """
        if self._undecided is not None:
            cluster = cluster.masked_fill(~self._undecided[cluster], -1)
        ordered, rows = cluster.sort(stable=True)
        first = int((ordered < 0).sum())
        rows = rows[first:]
        return rows, Group(ordered[first:], place.index_select(0, rows), self)

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

    def alone(self) -> tuple[Tensor, Group]:
        """The T leaves of the clusters that have rows, and the group among these clusters."""
        touched = self.touched
        sizes, T = touched.sizes, touched.leaves
        starts = F.pad(sizes.cumsum(0), (1, 0))
        target = self.target + (starts[:-1] - touched.starts).index_select(0, touched.of_row)
        every = torch.arange(T, device=starts.device)
        grouping = Grouping(consecutive(sizes, T), every, every[:0], every, starts)
        return ranges(touched.starts, sizes, T), Group(touched.of_row, target, grouping)

    @cached_property
    @untraced
    def lengths(self) -> Tensor:
        """(n) how many leaves each row needs."""
        return self.grouping.sizes.index_select(0, self.cluster)

    @property
    def pairs(self) -> int:
        """P, the number of pairs."""
        return self.touched.pairs

    @cached_property
    @untraced
    def touched(self) -> Touched:
        """The clusters that have rows."""
        return Touched.by(self)


@dataclass(frozen=True, eq=False)
class Touched:
    """The U clusters that have rows in a group.

    cluster: (U) which they are.
    of_row: (n) which of the U each row has.
    rows: (U) how many rows each has; first_row: (U) the first of them.
    sizes: (U) how many leaves each has; starts: (U) the first of them.
    """

    cluster: Tensor
    of_row: Tensor
    rows: Tensor
    first_row: Tensor
    sizes: Tensor
    starts: Tensor

    @classmethod
    def by(cls, group: Group) -> Touched:
        cluster, of_row, rows = torch.unique_consecutive(
            group.cluster, return_inverse=True, return_counts=True
        )
        sizes = group.grouping.sizes.index_select(0, cluster)
        starts = group.grouping.starts.index_select(0, cluster)
        return cls(cluster, of_row, rows, rows.cumsum(0) - rows, sizes, starts)

    @property
    def leaves(self) -> int:
        """T, how many leaves they have together."""
        return self._extents[0]

    @property
    def largest(self) -> int:
        """How many leaves the largest has."""
        return self._extents[1]

    @property
    def most_rows(self) -> int:
        """The largest number of rows that one has."""
        return self._extents[2]

    @property
    def pairs(self) -> int:
        """P, how many leaves their rows need together."""
        return self._extents[3]

    @cached_property
    @untraced
    def _extents(self) -> tuple[int, int, int, int]:
        """Read together, since a GPU is waited for."""
        if not len(self.sizes):
            return 0, 0, 0, 0
        leaves, largest, most_rows, pairs = in_one_wait(
            self.sizes.sum(), self.sizes.max(), self.rows.max(), (self.sizes * self.rows).sum()
        )
        return leaves, largest, most_rows, pairs
