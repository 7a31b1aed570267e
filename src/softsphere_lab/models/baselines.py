"""Output layers that those of the library are compared with.

They treat classes by their ranks: the commonest class has rank 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import checks

__all__ = ["AdaptiveSoftmax", "Baseline", "HierarchicalSoftmax", "default_cutoffs"]

# The most that log-probabilities of some rows and their intermediate results may take.
MOST_BYTES = 64 << 20
CUTOFFS = (2_000, 20_000, 200_000, 2_000_000)


class Baseline(nn.Module, ABC):
    """A distribution over D classes that is called like the library's output layers.

    counts: (D) how often each class occurs. Of equally common classes the one with the lower number
    ranks first. None means that classes come commonest first.
    """

    ranks: Tensor | None

    def __init__(self, in_features: int, num_classes: int, counts: Tensor | None = None) -> None:
        super().__init__()
        checks.at_least_one("in_features", in_features)
        checks.at_least_one("num_classes", num_classes)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.in_features, self.num_classes = in_features, num_classes
        ranks = None
        if counts is not None and bool((counts.diff() > 0).any()):
            ranks = counts.argsort(descending=True, stable=True).argsort()
        self.register_buffer("ranks", ranks, persistent=False)

    @abstractmethod
    def mean_loss(self, H: Tensor, target: Tensor) -> Tensor:
        """Returns the mean of −log p_t over rows H (m, d) whose targets (m) are ranks."""

    @abstractmethod
    def every_log_prob(self, H: Tensor) -> Tensor:
        """Returns log p_k of rows H (m, d) as (m, D), in the order of the ranks."""

    def rank_of(self, classes: Tensor) -> Tensor:
        """Returns the ranks by frequency of classes."""
        return classes if self.ranks is None else self.ranks[classes]

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns the mean negative log-likelihood of targets (…) given hidden rows (…, d)."""
        self.check(hidden, target)
        return self.mean_loss(
            hidden.reshape(-1, self.in_features), self.rank_of(target).reshape(-1)
        )

    @torch.no_grad()
    def log_prob(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """Returns log p_k of all classes (…, D), or of the given classes (n) as (…, n)."""
        checks.hidden(hidden, self.in_features)
        if classes is None:
            result = self.every_log_prob(hidden.reshape(-1, self.in_features))
            result = result if self.ranks is None else result[:, self.ranks]
        else:
            checks.classes(classes, self.num_classes)
            wanted = self.rank_of(classes)
            portions = hidden.reshape(-1, self.in_features).split(self.rows_at_once(hidden))
            result = torch.cat([self.every_log_prob(H)[:, wanted] for H in portions])
        return result.view(*hidden.shape[:-1], result.shape[1])

    @torch.no_grad()
    def rank(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns 1 + the number of classes with a higher probability than the target, as (…)."""
        self.check(hidden, target)
        size = self.rows_at_once(hidden)
        portions = hidden.reshape(-1, self.in_features).split(size)
        above = []
        for H, t in zip(portions, self.rank_of(target).reshape(-1).split(size), strict=True):
            log_p = self.every_log_prob(H)
            own = t.unsqueeze(1)
            # a NaN score ranks last
            better = ~(log_p <= log_p.gather(1, own))
            above.append(better.scatter(1, own, False).sum(1))
        return torch.cat(above).view(target.shape) + 1

    def check(self, hidden: Tensor, target: Tensor) -> None:
        checks.hidden(hidden, self.in_features)
        checks.rows_target(hidden.shape[:-1], target)
        checks.classes(target, self.num_classes, "target")

    def rows_at_once(self, hidden: Tensor) -> int:
        """Returns how many rows fit MOST_BYTES with three tensors of their scores, at least one."""
        return max(1, MOST_BYTES // (3 * hidden.element_size() * self.num_classes))


class HierarchicalSoftmax(Baseline):
    r"""Two-level softmax: p_t = p(cluster of t | h) p(t | its cluster, h), each a softmax.

    There are C = ⌈√D⌉ clusters of at most C classes. The class of rank t is leaf ⌊t / C⌋ of cluster
    t mod C, so that each cluster has one of the C commonest classes and its share of the rarer
    ones. All clusters then have about the same probability and are trained about equally often.

    Args:
        in_features: d.
        num_classes: D, at least 2. Leaves beyond D have probability exactly zero.
        counts: (D) how often each class occurs; None means that classes come commonest first.
        bias: whether both levels have a bias.
        sparse: whether the gradients of the leaves are sparse, for `SGD` and `SparseAdam` alone. A
            step then touches the clusters of the targets only.

    Shapes: hidden (…, d); target (…) class indices.
    A step gathers m √D rows of width d. Dense gradients cost another O(D d).

    Source: Goodman 2001, arXiv:cs/0108006.

    >>> head = HierarchicalSoftmax(8, 1000)
    >>> hidden = torch.randn(4, 8)
    >>> float(head.log_prob(hidden).exp().sum(1).sub(1).abs().max()) < 1e-5
    True
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        counts: Tensor | None = None,
        bias: bool = True,
        sparse: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes, counts)
        self.sparse = sparse
        self.clusters = math.isqrt(num_classes - 1) + 1
        self.leaves = -(-num_classes // self.clusters)
        self.top = nn.Linear(in_features, self.clusters, bias)
        # one row for each cluster, as a sparse gradient needs it
        self.weight = nn.Parameter(torch.empty(self.clusters, self.leaves * in_features))
        self.bias = nn.Parameter(torch.empty(self.clusters, self.leaves)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear` at both levels."""
        self.top.reset_parameters()
        bound = 1 / math.sqrt(self.in_features)
        for values in (self.weight, self.bias):
            if values is not None:
                nn.init.uniform_(values, -bound, bound)

    def absent(self, cluster: Tensor) -> Tensor:
        """Returns which leaves of the clusters (n) are no classes, as (n, leaves)."""
        leaf = torch.arange(self.leaves, device=cluster.device)
        return leaf * self.clusters + cluster.unsqueeze(1) >= self.num_classes

    def mean_loss(self, H: Tensor, target: Tensor) -> Tensor:
        cluster, leaf = target % self.clusters, target // self.clusters
        rows = F.embedding(cluster, self.weight, sparse=self.sparse)
        rows = rows.view(-1, self.leaves, self.in_features)
        o = torch.bmm(rows, H.unsqueeze(2)).squeeze(2)
        if self.bias is not None:
            o = o + F.embedding(cluster, self.bias, sparse=self.sparse)
        o = o.masked_fill(self.absent(cluster), -torch.inf)
        return F.cross_entropy(self.top(H), cluster) + F.cross_entropy(o, leaf)

    def every_log_prob(self, H: Tensor) -> Tensor:
        W = self.weight.view(-1, self.in_features)
        o = F.linear(H, W, None if self.bias is None else self.bias.view(-1))
        o = o.view(-1, self.clusters, self.leaves)
        o.masked_fill_(self.absent(torch.arange(self.clusters, device=H.device)), -torch.inf)
        o = o.log_softmax(2)
        o += self.top(H).log_softmax(1).unsqueeze(2)
        return o.mT.flatten(1)[:, : self.num_classes]


class AdaptiveSoftmax(Baseline):
    r"""`nn.AdaptiveLogSoftmaxWithLoss` for rows of any leading shape, with ranks.

    The commonest classes and the clusters of the others share one softmax; the i-th cluster has a
    softmax of its own over ⌊d / vⁱ⌋ projected numbers.

    Args:
        in_features: d.
        num_classes: D, at least 2.
        counts: (D) how often each class occurs; None means that classes come commonest first.
        cutoffs: the rank of the first class of each cluster; see `default_cutoffs`.
        div_value: v, how many times narrower each cluster is than the one before; None means 4, or
            d if that is less.
        bias: whether the first softmax has a bias; those of the clusters have none.

    Shapes: hidden (…, d); target (…) class indices.

    Source: Grave et al. 2017, arXiv:1609.04309.

    >>> AdaptiveSoftmax(8, 30_000)(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)).shape
    torch.Size([])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        counts: Tensor | None = None,
        cutoffs: Sequence[int] | None = None,
        div_value: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, num_classes, counts)
        self.layer = nn.AdaptiveLogSoftmaxWithLoss(
            in_features,
            num_classes,
            default_cutoffs(in_features, num_classes) if cutoffs is None else list(cutoffs),
            div_value=_shrinkage(in_features) if div_value is None else div_value,
            head_bias=bias,
        )

    def reset_parameters(self) -> None:
        self.layer.reset_parameters()

    def rows(self, classes: Tensor) -> Tensor:
        """Returns the rows (…, d) of the weight that belong to classes (…).

        Those of the clusters are read behind their projections, which take d numbers to d as long
        as `div_value` is 1.
        """
        return F.embedding(self.rank_of(classes), torch.cat(self._parts()))

    @torch.no_grad()
    def copy_rows(self, rows: Tensor) -> None:
        """Copies rows (D, d), one for each class, into the weight; see `rows`."""
        by_rank = (
            rows if self.ranks is None else torch.empty_like(rows).index_copy_(0, self.ranks, rows)
        )
        parts = self._parts()
        for part, its in zip(parts, by_rank.split([len(part) for part in parts]), strict=True):
            part.copy_(its)

    def _parts(self) -> list[Tensor]:
        """Returns the weights of the classes of the first softmax, and of each cluster."""
        first = self.layer.head.weight[: self.layer.cutoffs[0]]
        tails = [cast(nn.Linear, cast(nn.Sequential, tail)[1]) for tail in self.layer.tail]
        return [first, *(tail.weight for tail in tails)]

    def mean_loss(self, H: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.layer(H, target).loss
        return loss

    def every_log_prob(self, H: Tensor) -> Tensor:
        return self.layer.log_prob(H)


def _shrinkage(in_features: int) -> float:
    """How many times narrower each cluster is than the one before: 4, or d if that is less."""
    return float(min(4, in_features))


def default_cutoffs(in_features: int, num_classes: int) -> list[int]:
    """Returns 2,000 and ten times as many each time, as far as they are below D.

    There are only as many clusters as have a width of at least 1, since a cluster without width
    could not tell its classes apart. Few classes are all in the first softmax: PyTorch demands one
    cluster, which then has the last class alone.

    >>> default_cutoffs(128, 100_000), default_cutoffs(8, 100_000), default_cutoffs(128, 1000)
    ([2000, 20000], [2000], [999])
    """
    factor = _shrinkage(in_features)
    wide_enough = [c for i, c in enumerate(CUTOFFS, 1) if in_features // factor**i >= 1]
    return [c for c in wide_enough if c < num_classes] or [num_classes - 1]
