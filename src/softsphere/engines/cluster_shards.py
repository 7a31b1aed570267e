"""Which classes of a clustered layer belong to which rank of a process group.

The rows of the root, for the shortlist and the clusters, are sharded as DTensor's Shard(0) does it.
A cluster belongs to one rank as a whole, so that a rank computes its leaves like a layer without a
group. The ranks have about the same share of the frequency, and mostly of the classes as well,
since each has common and rare clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere._torch import integers, untraced
from softsphere.engines.grouping import Grouping, consecutive
from softsphere.parallel import Owners, Sharding

__all__ = ["ClusterShards"]


@dataclass(frozen=True, eq=False)
class ClusterShards:
    """The classes of the ranks. A layer without a process group has one rank.

    The classes of a rank are those of the shortlist that have their rows of the root there, and
    then its leaves. Their places are numbered in this order.

    grouping: the shortlist and the clusters of all classes.
    root: the S + C rows of the root.
    owners: of the clusters.
    """

    grouping: Grouping
    root: Sharding
    owners: Owners

    @classmethod
    def of(cls, grouping: Grouping, shares: Tensor, size: int = 1, rank: int = 0) -> ClusterShards:
        """Gives each rank about the same sum of the shares (S + C) of its clusters."""
        S, C = len(grouping.shortlist), grouping.num_clusters
        root = Sharding(S + C, size, rank)
        return cls(grouping, root, Owners.balanced(shares[S:], size, rank))

    @untraced
    def to(self, device: torch.device) -> ClusterShards:
        """The same on a device."""
        grouping = self.grouping.to(device)
        return self if grouping is self.grouping else replace(self, grouping=grouping)

    @cached_property
    @untraced
    def clusters(self) -> Tensor:
        """The clusters of this rank."""
        return self._clusters_of(self.root.rank)

    def _clusters_of(self, rank: int) -> Tensor:
        return self.owners.rows_of(rank).to(self.grouping.starts.device)

    @cached_property
    @untraced
    def starts(self) -> Tensor:
        """The first leaf of each cluster of this rank among its leaves, and their number."""
        return F.pad(self.grouping.sizes[self.clusters].cumsum(0), (1, 0))

    @cached_property
    @untraced
    def number_of_leaves(self) -> int:
        """The number of leaves of this rank."""
        return int(self.starts[-1])

    def leaves(self) -> Tensor:
        """The leaves of this rank among all leaves."""
        return self.grouping.leaves_of(self.clusters)

    def leaf_owners(self) -> Owners:
        """The owners of all leaves."""
        owner = self.owners.owner[self.grouping.cluster_of_leaf.cpu()]
        return Owners(owner, self.root.size, self.root.rank)

    def listed_of(self, rank: int) -> slice:
        """The classes of the shortlist that have their rows of the root on a rank."""
        S, rows = len(self.grouping.shortlist), self.root.slice_of(rank)
        return slice(min(rows.start, S), min(rows.stop, S))

    @cached_property
    @untraced
    def listed(self) -> slice:
        """Those of this rank."""
        return self.listed_of(self.root.rank)

    def number_of(self, rank: int) -> int:
        """The number of classes of a rank."""
        return self._numbers_of_classes[rank]

    @cached_property
    @untraced
    def _numbers_of_classes(self) -> list[int]:
        """Those of all ranks, for which a GPU is waited for once."""
        ranks, sizes = range(self.root.size), self.grouping.sizes
        leaves = integers(torch.stack([sizes[self._clusters_of(rank)].sum() for rank in ranks]))
        listed = map(self.listed_of, ranks)
        return [n + part.stop - part.start for n, part in zip(leaves, listed, strict=True)]

    def __len__(self) -> int:
        return self.number_of(self.root.rank)

    @cached_property
    @untraced
    def share(self) -> int:
        """The largest number of classes that a rank has."""
        return max(self._numbers_of_classes)

    def own_leaves(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The cluster of classes among those of this rank, and their place among its leaves.

        The cluster is −1 for those of other ranks and of the shortlist, and the place then is 0.
        """
        cluster = self.grouping.cluster[classes]
        number = self._numbers[cluster]  # −1 looks at the last entry
        place = self.grouping.place[classes] - self.grouping.starts[cluster]
        return number, torch.where(number < 0, 0, place + self.starts[number])

    @cached_property
    @untraced
    def _numbers(self) -> Tensor:
        """(C + 1) the numbers of all clusters among those of this rank; −1 for others, and last."""
        numbers = self.grouping.starts.new_full((self.grouping.num_clusters + 1,), -1)
        numbers[self.clusters] = torch.arange(len(self.clusters), device=numbers.device)
        return numbers

    def local(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The places of classes among those of this rank, and whether they are its own.

        The place of a class of another rank is 0.
        """
        place, first = self.grouping.place[classes], self.listed
        listed = self.grouping.cluster[classes] < 0
        number, leaf = self.own_leaves(classes)
        in_list = (place >= first.start) & (place < first.stop)
        own = torch.where(listed, in_list, number >= 0)
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
        leaves = self.grouping.leaves_of(self._clusters_of(rank))
        return torch.cat([listed, self.grouping.leaves[leaves]])

    @cached_property
    @untraced
    def own(self) -> Grouping:
        """The shortlist and the clusters of this rank, with its classes numbered by place."""
        sizes = self.grouping.sizes[self.clusters]
        of_leaf = consecutive(sizes)
        leaves = torch.arange(len(of_leaf), device=sizes.device)
        listed = torch.arange(self.listed.stop - self.listed.start, device=sizes.device)
        return Grouping(
            cluster=torch.cat([torch.full_like(listed, -1), of_leaf]),
            place=torch.cat([listed, leaves]),
            shortlist=listed,
            leaves=leaves + len(listed),
            starts=self.starts,
        )
