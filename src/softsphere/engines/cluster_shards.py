"""Which classes of a clustered layer belong to which rank of a process group.

The rows of the root, for the shortlist and the clusters, are sharded as DTensor's Shard(0) does it.
A cluster belongs to one rank as a whole, so that a rank computes its leaves like a layer without a
group. Each rank has clusters that follow one another, and about the same share of the frequency:
its leaves are then neighbours in the weight of all leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from softsphere.engines.grouping import Grouping
from softsphere.parallel import Cuts, Sharding

__all__ = ["ClusterShards"]


@dataclass(frozen=True, eq=False)
class ClusterShards:
    """The classes of the ranks. A layer without a process group has one rank.

    The classes of a rank are those of the shortlist that have their rows of the root there, and
    then its leaves. Their places are numbered in this order.

    grouping: the shortlist and the clusters of all classes.
    root: the S + C rows of the root.
    clusters: the clusters.
    """

    grouping: Grouping
    root: Sharding
    clusters: Cuts

    @classmethod
    def of(cls, grouping: Grouping, shares: Tensor, size: int = 1, rank: int = 0) -> ClusterShards:
        """Gives each rank about the same sum of the shares (S + C) of shortlist and clusters."""
        S, C = len(grouping.shortlist), grouping.num_clusters
        root = Sharding(S + C, size, rank)
        return cls(grouping, root, Cuts.balanced(shares[S:], size, rank))

    def to(self, device: torch.device) -> ClusterShards:
        """The same on a device."""
        grouping = self.grouping.to(device)
        return self if grouping is self.grouping else replace(self, grouping=grouping)

    @cached_property
    def leaves(self) -> Cuts:
        """The leaves of the ranks among all leaves."""
        starts = self.grouping.starts.tolist()
        return Cuts(tuple(starts[cluster] for cluster in self.clusters.starts), self.clusters.rank)

    def listed_of(self, rank: int) -> slice:
        """The classes of the shortlist that have their rows of the root on a rank."""
        S, rows = len(self.grouping.shortlist), self.root.slice_of(rank)
        return slice(min(rows.start, S), min(rows.stop, S))

    @cached_property
    def listed(self) -> slice:
        """Those of this rank."""
        return self.listed_of(self.root.rank)

    def number_of(self, rank: int) -> int:
        """The number of classes of a rank."""
        listed, leaves = self.listed_of(rank), self.leaves.slice_of(rank)
        number: int = listed.stop - listed.start + leaves.stop - leaves.start
        return number

    def __len__(self) -> int:
        return self.number_of(self.root.rank)

    @cached_property
    def share(self) -> int:
        """The largest number of classes that a rank has."""
        return max(self.number_of(rank) for rank in range(self.root.size))

    def local(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The places of classes among those of this rank, and whether they are its own.

        The place of a class of another rank is 0.
        """
        place, first = self.grouping.place[classes], self.listed
        listed = self.grouping.cluster[classes] < 0
        leaf, own_leaf = self.leaves.local(place)
        in_list = (place >= first.start) & (place < first.stop)
        own = torch.where(listed, in_list, own_leaf)
        place = torch.where(listed, place - first.start, leaf + first.stop - first.start)
        return torch.where(own, place, 0), own

    def classes_of(self, rank: int, start: int, size: int) -> Tensor:
        """At most `size` classes of a rank, from the one at a place among its own."""
        return self._all_of(rank)[start : start + size]

    def named(self, places: Tensor) -> Tensor:
        """The classes at places among those of this rank."""
        return self._all_of(self.root.rank)[places]

    def _all_of(self, rank: int) -> Tensor:
        listed = self.grouping.shortlist[self.listed_of(rank)]
        return torch.cat([listed, self.grouping.leaves[self.leaves.slice_of(rank)]])

    @cached_property
    def own(self) -> Grouping:
        """The shortlist and the clusters of this rank, with its classes numbered by place."""
        device = self.grouping.starts.device
        listed = torch.arange(self.listed.stop - self.listed.start, device=device)
        leaves = torch.arange(len(self.leaves), device=device)
        of_leaf = self.grouping.cluster_of_leaf[self.leaves.slice] - self.clusters.start
        starts = self.grouping.starts[self.clusters.start : self.clusters.stop + 1]
        return Grouping(
            cluster=torch.cat([torch.full_like(listed, -1), of_leaf]),
            place=torch.cat([listed, leaves]),
            shortlist=listed,
            leaves=leaves + len(listed),
            starts=starts - self.leaves.start,
        )
