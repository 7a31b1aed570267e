"""Predictions from a clustered layer whose clusters belong to ranks.

The ranks find the scores of the root together, and each row's own rank has them all: O(m (S + C))
numbers are sent. The leaves are then read like any sharded classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softsphere import losses
from softsphere._torch import values_on_cpu
from softsphere.engines.cluster_shards import ClusterShards
from softsphere.functional.on_leaves import Leaves
from softsphere.heads.clustered_reader import ClusteredReader, Root, root_log_prob
from softsphere.heads.sharded_reader import ReaderOfRank, ShardedReader
from softsphere.parallel import Shards

__all__ = ["ReaderOfClusters", "ShardedClusteredReader"]


class ReaderOfClusters(ClusteredReader, ReaderOfRank):
    """A reader of the clusters of one rank, and of its classes of the shortlist.

    Its rows H are those of a reader of all clusters, with log p of the whole root.
    """

    def __init__(
        self,
        loss: losses.Loss,
        root: Root,
        leaves: Leaves,
        clusters: ClusterShards,
        versions: tuple[Any, ...],
    ) -> None:
        super().__init__(loss, root, leaves, clusters.own, len(clusters))
        self.clusters, self._versions = clusters, versions

    @property
    def versions(self) -> tuple[Any, ...]:
        return self._versions

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S, total = len(self.clusters.grouping.shortlist), self.clusters.root.total
        short, clusters, z = rows.split([S, total - S, rows.shape[1] - total], 1)
        return short[:, self.clusters.listed], clusters[:, self.clusters.clusters], z

    def _number(self, cluster: Tensor) -> Tensor:
        return F.pad(self.clusters.clusters, (0, 1), value=-1)[cluster]

    def _finite(self, log_norm: Tensor) -> Tensor:
        if values_on_cpu(log_norm):
            self.infinite |= bool((log_norm == torch.inf).any())
        return log_norm


class ShardedClusteredReader(ShardedReader):
    """A reader of the clusters of all ranks."""

    own: ReaderOfClusters

    def __init__(self, own: ReaderOfClusters, shards: Shards) -> None:
        super().__init__(own, shards, own.clusters)

    def rows_of(self, hidden: Tensor) -> Tensor:
        clusters, scores = self.own.clusters, self.own.root.scores
        H = hidden.reshape(-1, self.in_features).to(self.own.dtype)
        mine = self.own.affine(scores, self.batch.gathered(H))
        # the last ranks may have fewer rows of the root, or none
        padded = F.pad(mine, (0, clusters.root.share - mine.shape[1]))
        every = self.batch.sent(padded).transpose(0, 1).flatten(1)[:, : clusters.root.total]
        project = self.own.root.project
        z = H if project is None else self.own.affine(project, H)
        return torch.cat([root_log_prob(every, clusters.grouping), z], 1)

    def log_normaliser(self, H: Tensor) -> Tensor:
        """0: the scores are normalised."""
        return H.new_zeros(len(H))

    def scores_of(self, H: Tensor, classes: Tensor) -> Tensor:
        scores = super().scores_of(H, classes)
        self._refuse_infinite()
        return scores

    def chunks_of_scores(self, H: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
        yield from super().chunks_of_scores(H)
        self._refuse_infinite()
