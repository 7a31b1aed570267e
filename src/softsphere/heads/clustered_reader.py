"""Predictions from a clustered layer: log p_k = log p(cluster) + log π_k t(o_k) − log N_cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import losses
from softsphere._torch import exporting, is_recorded, values_on_cpu
from softsphere.engines.grouping import Grouping
from softsphere.engines.row_statistics import wide_dtype
from softsphere.functional.on_leaves import Leaves, leaf_losses, log_sums, root_scores
from softsphere.functional.root_losses import is_plain_linear
from softsphere.heads.reader import INFINITE, SCORES, Reader
from softsphere.heads.row_keys import keys_of_rows
from softsphere.matrix import FactoredTensor

__all__ = ["ClusteredReader", "Root", "root_log_prob"]


class Root(NamedTuple):
    """The layers above the leaves: what scores shortlist and clusters, and what projects rows."""

    scores: nn.Linear
    project: nn.Linear | None


def root_log_prob(logits: Tensor, grouping: Grouping) -> Tensor:
    """log p of the classes of the shortlist and of the clusters: (m, S + C), float32 or wider.

    Clusters without classes have probability 0.
    """
    return root_scores(logits, grouping).log_softmax(1)


class ClusteredReader(Reader):
    """A reader of a clustered layer, whose scores are log-probabilities already.

    The rows H of its methods are [log p of the root, z], so that each is computed once. Classes are
    read in the order of the shortlist and then of the leaves.
    """

    def __init__(
        self, loss: losses.Loss, root: Root, leaves: Leaves, grouping: Grouping, num_classes: int
    ) -> None:
        weight = root.scores.weight
        super().__init__(loss, weight.shape[1], num_classes, weight.device)
        self.dtype = wide_dtype(weight.dtype)
        self.root, self.grouping = root, grouping
        self.leaves = leaves.recorded_in(self.dtype)
        self.S = len(grouping.shortlist)

    def rows_of(self, hidden: Tensor) -> Tensor:
        H = hidden.reshape(-1, self.in_features)
        log_p = root_log_prob(self._called(self.root.scores, H), self.grouping)
        project = self.root.project
        z = H.to(self.dtype) if project is None else self._called(project, H)
        return torch.cat([log_p, z], 1)

    def _called(self, layer: nn.Linear, H: Tensor) -> Tensor:
        """What a layer above the leaves makes of H, in the dtype of the computation.

        A layer that is more than a product, by its hooks or another class, is called as the loss
        calls it.
        """
        return self.affine(layer, H) if is_plain_linear(layer) else layer(H).to(self.dtype)

    def affine(self, layer: nn.Linear, H: Tensor) -> Tensor:
        """The product with the weight of a layer above the leaves."""
        b: Tensor | None = layer.bias
        b = None if b is None else b.to(self.dtype)
        return F.linear(H.to(self.dtype), layer.weight.to(self.dtype), b)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p of the shortlist (m, S) and of the clusters (m, C), and z (m, d')."""
        C = self.grouping.num_clusters
        short, clusters, z = rows.split([self.S, C, rows.shape[1] - self.S - C], 1)
        return short, clusters, z

    def _numerators(self, z: Tensor, leaves: Tensor | slice) -> Tensor:
        """log π_k t(o_k) of some leaves: (m, ·)."""
        W, b = self.leaves.rows(leaves, z.shape[1])
        o = F.linear(z, W.to(z.dtype), None if b is None else b.to(z.dtype))
        return self.loss.log_numerator(o) + self.leaves.pi[leaves].log().to(o.dtype)

    def _log_normalisers(self, z: Tensor) -> Tensor:
        """log N_c of every cluster: (m, C)."""
        C = self.grouping.num_clusters
        total = z.new_full((z.shape[0], C), -torch.inf)
        for part in self._leaf_parts(z.shape[0]):
            clusters = self.grouping.cluster_of_leaf[part]
            total = torch.logaddexp(total, log_sums(self._numerators(z, part), clusters, C))
        return self._finite(total)

    def _finite(self, log_norm: Tensor) -> Tensor:
        """Raises ValueError, on a CPU, if outputs are infinite."""
        if values_on_cpu(log_norm) and bool((log_norm == torch.inf).any()):
            raise ValueError(INFINITE)
        return log_norm

    def _leaf_parts(self, rows: int) -> Iterator[slice]:
        L = len(self.grouping.leaves)
        size = L if exporting() else self._at_once(rows)
        for start in range(0, L, size):
            yield slice(start, min(start + size, L))

    def _at_once(self, rows: int) -> int:
        """The number of leaves whose scores for so many rows are in memory at once."""
        return max(1, SCORES // max(rows, self.leaves.W.shape[1], 1))

    def chunks_of_scores(self, H: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        short, clusters, z = self._split(H)
        if self.S:
            yield self.grouping.shortlist, short.clone()
        if not len(self.grouping.leaves):
            return
        offset = clusters - self._log_normalisers(z)
        for part in self._leaf_parts(H.shape[0]):
            of_leaf = self.grouping.cluster_of_leaf[part]
            yield (
                self.grouping.leaves[part],
                self._numerators(z, part) + offset.index_select(1, of_leaf),
            )

    def every_score(self, H: Tensor) -> Tensor:
        scores = torch.cat([scores for _, scores in self.chunks_of_scores(H)], 1)
        cluster, place = self.grouping.cluster, self.grouping.place
        return scores.index_select(1, torch.where(cluster < 0, place, place + self.S))

    def every_log_prob(self, H: Tensor) -> Tensor:
        """The scores, which are normalised: a cluster with NaN leaves the others as they are."""
        return self.every_score(H)

    def scores_of(self, H: Tensor, classes: Tensor) -> Tensor:
        if exporting():  # which clusters are needed would depend on the classes
            return self.every_score(H).index_select(1, classes)
        short, clusters, z = self._split(H)
        cluster, place = self.grouping.cluster[classes], self.grouping.place[classes]
        listed = cluster < 0
        found = (
            short.index_select(1, torch.where(listed, place, 0))
            if self.S
            else H.new_zeros(len(H), len(classes))
        )
        if bool(listed.all()):
            return found
        needed, slot = cluster.clamp_min(0).unique(return_inverse=True)
        leaves = self.grouping.leaves_of(needed)
        of_leaf = torch.searchsorted(needed, self.grouping.cluster_of_leaf[leaves])
        total = z.new_full((len(z), len(needed)), -torch.inf)
        size = self._at_once(len(z))
        for part, owner in zip(leaves.split(size), of_leaf.split(size), strict=True):
            sums = log_sums(self._numerators(z, part), owner, len(needed))
            total = torch.logaddexp(total, sums)
        offset = clusters.index_select(1, needed) - self._finite(total)
        own = self._numerators(z, torch.where(listed, 0, place)) + offset.index_select(1, slot)
        return torch.where(listed, found, own)

    def log_normaliser(self, H: Tensor) -> Tensor:
        """0: the scores are normalised."""
        return H.new_zeros(H.shape[0])

    def is_differentiated(self, hidden: Tensor) -> bool:
        root, project = self.root
        projection = None if project is None else project.weight
        return is_recorded(hidden, root.weight, root.bias, projection, *self.leaves)

    def rank(self, H: Tensor, target: Tensor) -> Tensor:
        if exporting():
            raise RuntimeError(
                "rank of a clustered layer needs the clusters of the targets, which an exported "
                "program cannot look at; export log_prob, and count the classes above the target"
            )
        scores, key = self.of_targets(H, target)
        return torch.where(scores[0].isnan(), self.num_classes, self.better(H, scores, key) + 1)

    def of_targets(self, H: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of one class for each row and its π, (2, m), and keys of the rows of W (m)."""
        scores = torch.stack([self._own_scores(H, target), self._measure(target).to(H.dtype)])
        return scores, self._keys(target)

    def better(self, H: Tensor, scores: Tensor, key: Tensor) -> Tensor:
        """How many classes have a better score than those of `of_targets`: (m)."""
        above = torch.zeros_like(key)
        own, own_pi = scores.unsqueeze(2)
        for classes, found in self.chunks_of_scores(H):
            twin = self._keys(classes) == key.unsqueeze(1)
            better = (found > own) & ~twin
            better = better | (twin & (self._measure(classes) > own_pi))
            above = above + better.sum(1)
        return above

    def _own_scores(self, H: Tensor, target: Tensor) -> Tensor:
        """The scores of one class for each row, from its own cluster alone: (m)."""
        cluster, place = self.grouping.cluster[target], self.grouping.place[target]
        short, clusters, z = self._split(H)
        entry = self.grouping.root_entry(cluster, place).unsqueeze(1)
        own = torch.cat([short, clusters], 1).gather(1, entry).squeeze(1)
        rows, group = self.grouping.group(cluster, place)
        engine = "factored" if isinstance(self.leaves.W, FactoredTensor) else "logits"
        nll = leaf_losses(self.loss, z[rows], self.leaves, group, engine=engine, sparse=False)
        return own.index_add(0, rows, nll, alpha=-1)

    def _keys(self, classes: Tensor) -> Tensor:
        """Integers that are equal for classes of one cluster, or of the shortlist, with equal rows
        of the weight."""
        cluster, place = self.grouping.cluster[classes], self.grouping.place[classes]
        listed = cluster < 0
        keys = torch.empty_like(cluster)
        scores = self.root.scores
        shortlist = Leaves(scores.weight, scores.bias, self.leaves.pi)
        for some, table in ((listed, shortlist), (~listed, self.leaves)):
            owner = self._number(cluster[some]).to(self.dtype).unsqueeze(1)
            columns = (x.to(self.dtype) for x in table.distinct(place[some]))
            keys[some] = keys_of_rows(owner, *columns)
        return keys

    def _number(self, cluster: Tensor) -> Tensor:
        """Which clusters they are among those of all ranks."""
        return cluster

    def _measure(self, classes: Tensor) -> Tensor:
        """π of classes in clusters, and 1 of those of the shortlist: (n)."""
        pi = F.pad(self.leaves.pi, (0, 1), value=1.0)
        place = self.grouping.place[classes]
        return pi[torch.where(self.grouping.cluster[classes] < 0, len(pi) - 1, place)]
