"""How many classes belong in the shortlist, and how many clusters the others make.

The cost of a row, counted in outputs of d multiply-adds each, where S is the size of the shortlist,
C the number of clusters, and T(S) the share of the frequency outside the shortlist:

    cost(S, C) = S + C + T(S) (TAIL + LEAF (D − S) / C)

The root computes S + C outputs for every row. A row whose target is in a cluster computes that
cluster as well, (D − S) / C outputs on average. LEAF is the price of such an output: the weight of
the root is read once for all rows, that of a leaf for the few rows of its cluster.

TAIL is a price of quality, not of time. Outputs alone would be fewest with a shortlist of some tens
of classes, but the root is a softmax, which fits the common classes better than a leaf does. At
this price a class belongs in the shortlist if it is the target of more than about one row in TAIL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softsphere import checks
from softsphere.clusters.placement import on_cpu

__all__ = ["Sizes", "default_sizes"]

TAIL = 12_000
LEAF = 6
STEPS = (1, 1.5, 2, 3, 5, 7)


class Sizes(NamedTuple):
    """The sizes of a clustered layer.

    Args:
        shortlist: S, the number of classes in the shortlist.
        num_clusters: C, the number of clusters of the other classes.
    """

    shortlist: int
    num_clusters: int


@on_cpu
def default_sizes(
    counts: Tensor, *, shortlist: int | None = None, num_clusters: int | None = None
) -> Sizes:
    """Returns the size of the shortlist and the number of clusters that cost least.

    The cost of a row is counted in outputs of d multiply-adds each. With S classes in the
    shortlist, C clusters, and the share T(S) of the frequency outside the shortlist, it is

        cost(S, C) = S + C + T(S) (12000 + 6 (D − S) / C).

    Every row computes the S + C outputs of the root. A row with a target in a cluster computes that
    cluster too, (D − S) / C outputs on average, each of which costs 6, since the weights of a
    cluster are read for a few rows only. The 12,000 is a price of quality: the softmax of the root
    fits common classes better than a cluster does, so a class that is the target of more than about
    one row in 12,000 belongs in the shortlist. The clusters are assumed to be of equal size.

    The minimum is taken over S = 0 and 1, 1.5, 2, 3, 5, 7 times powers of ten, and over powers of
    two for C.

    Args:
        counts: (D), how often each class occurs, or frequencies; in any order.
        shortlist: a given S, for which the best C is chosen.
        num_clusters: a given C, for which the best S is chosen.

    Returns the named tuple (shortlist, num_clusters).

    Raises TypeError or ValueError for counts that are negative, not finite or all zero, for a
    shortlist of all classes or more, and for more clusters than classes outside the shortlist.

    >>> default_sizes(1e6 / torch.arange(1, 10_001))
    Sizes(shortlist=1500, num_clusters=128)
    """
    counts = checks.class_counts(counts)
    D = len(counts)
    if shortlist is not None:
        shortlist = checks.shortlist_size(shortlist, D)
    if num_clusters is not None:
        num_clusters = checks.number_of_clusters(num_clusters, D - (shortlist or 0))
    frequency = counts.sort(descending=True).values / counts.sum()
    # The share of the classes from the S-th on, for S = 0 … D − 1.
    tail = frequency.flip(0).cumsum(0).flip(0)
    some_S = torch.tensor(_shortlists(D) if shortlist is None else [shortlist])[:, None]
    some_C = torch.tensor(_powers_of_two(D) if num_clusters is None else [num_clusters])
    left = D - some_S
    # a quotient of integers has the default dtype, which may be float16
    size = left.double() / some_C
    cost = some_S + some_C + tail[some_S] * (TAIL + LEAF * size)
    best = int(torch.where(some_C > left, torch.inf, cost).argmin())
    S, C = some_S[best // len(some_C)], some_C[best % len(some_C)]
    return Sizes(int(S), int(C))


def _shortlists(D: int) -> list[int]:
    scales = (10**power for power in range(len(str(D))))
    sizes = (int(step * scale) for scale in scales for step in STEPS)
    return [0, *sorted({size for size in sizes if size < D})]


def _powers_of_two(D: int) -> list[int]:
    return [2**power for power in range(D.bit_length())]
