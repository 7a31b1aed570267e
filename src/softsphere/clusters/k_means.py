"""Spherical k-means whose clusters hold at most a given share of the frequency.

The centres are those of scikit-learn's k-means on unit vectors, each class weighted by the square
root of its count: there are more centres where common classes are, which evens out the shares and
keeps the vectors of rare classes, which are noise for the most part, from placing the centres.

A class then joins the centre with the largest cosine. Where a cluster would exceed the bound, the
classes nearest to its centre stay, and the others go on to the next nearest cluster with room. The
number of clusters is the one asked for, which a split of large clusters would change.
"""

from __future__ import annotations

import heapq
import math
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from softsphere.clusters.extra import needed, one_thread

__all__ = ["clusters_of_rare", "dealt_out", "spherical_centres", "within_bound"]

# So many classes, the commonest ones, place the centres.
FITTED = 65_536
ITERATIONS = 20
# Numbers in one block of cosines.
BLOCK = 2**26


def spherical_centres(unit: Tensor, weight: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Returns at most C unit centres (C, n) of unit rows (N, n), the commonest of which are first.

    weight: (N), how much each row counts.
    """
    rows = unit[:FITTED]
    cluster = needed("sklearn.cluster")
    fit = cluster.KMeans(
        min(num_clusters, len(rows)), n_init=1, max_iter=ITERATIONS, random_state=seed
    )
    with one_thread(), warnings.catch_warnings():
        # Equal rows can be fewer than clusters. Clusters that stay empty are filled later.
        warnings.simplefilter("ignore", needed("sklearn.exceptions").ConvergenceWarning)
        fit.fit(rows.numpy(), sample_weight=weight[:FITTED].numpy())
    return F.normalize(torch.from_numpy(fit.cluster_centers_).to(unit.dtype), dim=1)


def clusters_of_rare(share: Tensor, rare: Tensor, bound: float, C: int) -> int:
    """Returns how many of C clusters rare classes have: the fewest that can hold them.

    0 stands for none of their own, where rare classes have less than the mean share of a cluster,
    or where they and the others do not fit into C clusters together.

    share: (N) float64, whose sum is 1. rare: (N) bool.
    """

    def fewest(which: Tensor) -> int:
        own = share[which]
        # dealt out to the cluster that holds least, no cluster has more than the mean and one class
        return math.ceil(float(own.sum()) / max(bound - float(own.max()), 1e-12))

    common = ~rare
    if not bool(common.any()) or float(share[rare].sum()) < 1 / C:
        return 0
    R = fewest(rare)
    fits = R + fewest(common) <= C and int(rare.sum()) >= R and int(common.sum()) >= C - R
    return R if fits else 0


def dealt_out(share: Tensor, C: int) -> Tensor:
    """Returns the cluster (N) of each class, the commonest first to the cluster with least.

    share: (N) float64.
    """
    cluster = torch.full((len(share),), -1)
    _join_the_least(cluster, share, torch.zeros(C, dtype=torch.float64))
    return cluster


def within_bound(unit: Tensor, centres: Tensor, share: Tensor, bound: float, C: int) -> Tensor:
    """Returns the cluster (N) of each class; none holds more than `bound` of the shares.

    unit: (N, n) unit rows; a row of zeros says nothing of its class. centres: (C', n) with C' ≤ C.
    share: (N) float64. The bound is at least their sum / C plus the largest of them: a class can
    then always join the cluster that holds least.
    """
    cluster = torch.full((len(unit),), -1)
    load = torch.zeros(C, dtype=torch.float64)
    full = torch.zeros(len(centres), dtype=torch.bool)
    pending = unit.any(1).nonzero().flatten()
    while len(pending) and not bool(full.all()):
        likeness, wanted = _nearest(unit[pending], centres, full)
        # By cluster, and within a cluster the nearest class first.
        order = likeness.argsort(descending=True, stable=True)
        order = order[wanted[order].argsort(stable=True)]
        pending, wanted = pending[order], wanted[order]
        fits = load[wanted] + _sums_within(wanted, share[pending]) <= bound
        cluster[pending[fits]] = wanted[fits]
        load.index_add_(0, wanted[fits], share[pending[fits]])
        full[wanted[~fits]] = True
        pending = pending[~fits]
    _join_the_least(cluster, share, load)
    _fill_empty(cluster, C)
    return cluster


def _nearest(unit: Tensor, centres: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row with a centre of a cluster that is not full, and which."""
    open_ = (~full).nonzero().flatten()
    blocks = unit.split(max(1, BLOCK // len(open_)))
    found = [torch.max(block @ centres[open_].T, dim=1) for block in blocks]
    return torch.cat([best.values for best in found]), open_[
        torch.cat([best.indices for best in found])
    ]


def _sums_within(group: Tensor, value: Tensor) -> Tensor:
    """The running sums of the values of each group; equal groups are neighbours."""
    total = value.cumsum(0)
    first = torch.ones_like(group, dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    before = (total - value)[first]
    return total - before[first.cumsum(0) - 1]


def _join_the_least(cluster: Tensor, share: Tensor, load: Tensor) -> None:
    """Puts each class without a cluster, the commonest first, where least frequency is."""
    left = (cluster < 0).nonzero().flatten()
    left = left[share[left].argsort(descending=True, stable=True)]
    heap = [(held, number) for number, held in enumerate(load.tolist())]
    heapq.heapify(heap)
    joined = []
    for own in share[left].tolist():
        held, number = heap[0]
        joined.append(number)
        heapq.heapreplace(heap, (held + own, number))
    cluster[left] = torch.tensor(joined, dtype=cluster.dtype)


def _fill_empty(cluster: Tensor, C: int) -> None:
    """Gives every empty cluster half of the classes of the one that has most."""
    sizes = cluster.bincount(minlength=C)
    for empty in (sizes == 0).nonzero().flatten().tolist():
        most = int(sizes.argmax())
        moved = (cluster == most).nonzero().flatten()[1::2]
        cluster[moved] = empty
        sizes[empty], sizes[most] = len(moved), sizes[most] - len(moved)
