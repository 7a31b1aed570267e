"""The losses of a clustered output layer whose clusters belong to ranks.

Every rank gathers the rows h of all ranks. With its rows of the root it finds

    z_r = log Σ exp of its scores,    s_r = the score of the target's class or cluster, or 0,

and −log f of the target within its cluster, l_r, or 0 where the cluster is that of another rank. It
sends these three numbers to the rank of the row, whose loss is

    −log p = log Σ_r exp(z_r) − Σ_r s_r + Σ_r l_r.

Nothing else is sent in the forward, and only the derivative with respect to h and to the projection
in the backward: O(m d + d d') numbers, whatever the numbers of classes and clusters are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere import losses
from softsphere.engines.cluster_shards import ClusterShards
from softsphere.engines.row_statistics import wide_dtype
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_leaves import Leaves, leaf_losses, root_scores
from softsphere.functional.rows_over_ranks import LossOverRanks, WeightsOfRank
from softsphere.parallel import (
    Agreement,
    Batch,
    Shards,
    all_rows,
    answers_of_all,
    checksum,
    on_all_ranks,
)
from softsphere.targets import Targets

__all__ = ["ClustersOfRank", "LossOnClusterShards"]


class ClustersOfRank(NamedTuple):
    """What a rank has of a clustered layer.

    root, root_bias: its rows of the root, (·, d) and (·) or None.
    project: (d', d) the projection of hidden, the same on all ranks, or None.
    leaves: of its clusters.
    clusters: which they are.
    versions: name the values of the weights; None where the rank cannot tell.
    engine, sparse: see `leaf_losses`.
    """

    root: Tensor
    root_bias: Tensor | None
    project: Tensor | None
    leaves: Leaves
    clusters: ClusterShards
    versions: tuple[Any, ...]
    engine: str
    sparse: bool


class LossOnClusterShards(LossOverRanks):
    """See `LossOverRanks`.

    Args:
        hidden: (…, d), of this rank, already checked.
        entries: its targets.
    """

    def __init__(
        self,
        hidden: Tensor,
        entries: Targets,
        layer: ClustersOfRank,
        loss: losses.Loss,
        conventions: Conventions,
        shards: Shards,
        num_items: Any,
    ) -> None:
        H = hidden.reshape(len(entries.t), hidden.shape[-1])
        super().__init__(H, hidden, entries, loss, conventions, shards, num_items)
        self.layer, self.dtype = layer, wide_dtype(layer.leaves.pi.dtype)

    def weights(self) -> WeightsOfRank:
        layer = self.layer
        own = (layer.root, layer.leaves.W) if layer.engine != "factored" else (layer.root,)
        trained = layer.root, layer.root_bias, layer.project, *layer.leaves[:2]
        return WeightsOfRank(layer.versions, own, trained)

    def of_layer(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "engine": layer.engine,
            "sparse": layer.sparse,
            "bits_of_the_projection": checksum(layer.project),
        }

    def losses_of_rank(self, batch: Batch, agreed: Agreement) -> tuple[Tensor, Tensor]:
        return self.entries.weigh(self._losses(batch), overflows=False), self.entries.counted

    def _losses(self, batch: Batch) -> Tensor:
        """−log p of the target of each row of this rank: (m)."""
        target = self.entries.t.squeeze(1).masked_fill(self.entries.ignored, -1)
        target = batch.gathered(target)
        project = self.layer.project
        project = None if project is None else on_all_ranks(project, batch)
        H = all_rows(self.H, batch)
        found = [*self._of_root(H, target), self._of_leaves(H, project, target)]
        normaliser, own, leaf = answers_of_all(torch.stack(found, 1), batch).unbind(2)
        return normaliser.logsumexp(0) - own.sum(0) + leaf.sum(0)

    def _of_root(self, H: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """log Σ exp of the scores of this rank, and the score of the target, 0 if it has none."""
        clusters, (W, b, *_) = self.layer.clusters, self.layer
        rows = clusters.root.slice
        scores = root_scores(F.linear(H, W, b), clusters.grouping, rows).to(self.dtype)
        grouping, classes = clusters.grouping, target.clamp_min(0)
        entry = grouping.root_entry(grouping.cluster[classes], grouping.place[classes])
        place, own = clusters.root.local(entry)
        if not len(W):
            return scores.logsumexp(1), scores.sum(1)
        of_target = scores.gather(1, place.unsqueeze(1)).squeeze(1)
        return scores.logsumexp(1), torch.where(own, of_target, 0.0)

    def _of_leaves(self, H: Tensor, project: Tensor | None, target: Tensor) -> Tensor:
        """−log f of the target of each row within its cluster; 0 for those of other ranks."""
        layer, clusters = self.layer, self.layer.clusters
        cluster, place = clusters.own_leaves(target.clamp_min(0))
        kept = torch.where(target >= 0, cluster, -1)
        rows, group = clusters.own.group(kept, place)
        Z = H[rows] if project is None else F.linear(H[rows], project)
        with torch.autocast(H.device.type, enabled=False):
            of_leaves = leaf_losses(
                self.loss,
                Z.to(self.dtype),
                layer.leaves,
                group,
                engine=layer.engine,
                sparse=layer.sparse,
            )
        zeros = of_leaves.new_zeros(len(H), dtype=self.dtype)
        return zeros.index_add(0, rows, of_leaves.to(self.dtype))
