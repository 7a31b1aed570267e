"""Clusters of equally common classes."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere import checks
from softsphere.clusters.assignment import Clusters, from_tail
from softsphere.clusters.cost_model import default_sizes
from softsphere.clusters.placement import on_cpu

__all__ = ["by_frequency"]


@on_cpu
def by_frequency(
    counts: Tensor, *, num_clusters: int | None = None, shortlist: int | None = None
) -> Clusters:
    """Returns clusters of classes that are about equally common.

    The classes outside the shortlist are sorted by their counts and cut into runs with equal sums
    of √count: clusters of common classes are small and frequent, those of rare ones large and
    seldom. Where no class outweighs a run, this cut has about the least expected size of the
    cluster of a target, Σ_c share_c n_c. Classes that do belong in the shortlist.

    Args:
        counts: (D), how often each class occurs, or frequencies; in any order. A class that was
            never seen counts like the rarest one that was.
        num_clusters: C; by default `default_sizes` chooses it.
        shortlist: S, the number of the commonest classes that are in no cluster; by default
            `default_sizes` chooses it. Of equally common classes those with lower numbers come
            first.

    Returns a `Clusters` on the CPU, without vectors.

    Raises TypeError or ValueError for counts that are negative, not finite or all zero, for a
    shortlist of all classes or more, and for more clusters than classes outside the shortlist.

    Source: Dalenius & Hodges 1959, "Minimum variance stratification" (the rule of cumulative √f).

    >>> by_frequency(torch.tensor([1, 9, 100, 4, 4]), num_clusters=2, shortlist=1).assignment
    tensor([ 1,  0, -1,  1,  1])
    """
    counts = checks.class_counts(counts)
    sizes = default_sizes(counts, shortlist=shortlist, num_clusters=num_clusters)
    order = counts.argsort(descending=True, stable=True)
    tail, C = order[sizes.shortlist :], sizes.num_clusters
    weight = counts[tail].sqrt()
    middle = (weight.cumsum(0) - weight / 2) / weight.sum()
    # One class may outweigh several runs. The next class is in the next cluster all the same, and
    # since the counts descend no later one is skipped. Rounding may take the middle of the rarest
    # classes for the end.
    run = (middle * C).long().clamp_max(C - 1)
    cluster = torch.minimum(run, torch.arange(len(tail)))
    return from_tail(counts, tail, cluster)
