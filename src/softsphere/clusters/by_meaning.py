"""Clusters of classes that are alike: with similar vectors, or with similar neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere import checks
from softsphere.clusters.assignment import Clusters, directions, from_tail
from softsphere.clusters.co_occurrence import neighbour_vectors
from softsphere.clusters.cost_model import default_sizes
from softsphere.clusters.k_means import (
    clusters_of_rare,
    dealt_out,
    spherical_centres,
    within_bound,
)
from softsphere.clusters.placement import on_cpu

__all__ = ["by_neighbours", "by_vectors"]

# The default bound of the share of a cluster, in mean shares 1/C.
SPREAD = 4


@on_cpu
def by_vectors(
    vectors: Tensor,
    counts: Tensor,
    *,
    num_clusters: int | None = None,
    shortlist: int | None = None,
    largest_share: float | None = None,
    min_count: float = 0,
    seed: int = 0,
) -> Clusters:
    """Returns clusters of classes with similar vectors, by spherical k-means.

    scikit-learn's k-means places the centres among the directions v / ‖v‖ of the classes outside
    the shortlist, each weighted by √count, at most 65,536 of them, the commonest. Each class joins
    the cluster whose centre has the largest cosine with it. Where a cluster would hold more than
    `largest_share`, the classes nearest to its centre stay, and the others go on to the next
    nearest cluster with room. Classes with a row of zeros join the clusters that hold least.

    Balance matters: the cluster of a target is computed whole, and with a few clusters that hold
    nearly everything the output layer is no cheaper and no better than with one.

    Args:
        vectors: (D, n) floating-point, a row of numbers for each class, in the order of counts;
            zeros for a class of which nothing is known.
        counts: (D), how often each class occurs, or frequencies. A class that was never seen counts
            like the rarest one that was.
        num_clusters: C; by default `default_sizes` chooses it.
        shortlist: S, the number of the commonest classes that are in no cluster; by default
            `default_sizes` chooses it.
        largest_share: the bound of each cluster's share in the counts of all clusters. It must be
            at least 1/C plus the share of the commonest class outside the shortlist. The default
            is 4/C, or that if it is larger.
        min_count: a class with smaller counts is rare, and its vector says little of it. Rare
            classes are dealt out evenly to clusters of their own, as few as the bound allows. They
            join the others as usual where they would not fill a cluster of the mean share 1/C, and
            where they and the others do not fit into C clusters. 0 stands for no rare classes.
        seed: of k-means. The same arguments give the same clusters.

    Returns a `Clusters` on the CPU with the given vectors.

    Raises ImportError without scikit-learn, and TypeError or ValueError for vectors or counts of a
    wrong shape or that are not finite, for sizes that cannot be, and for a bound that cannot be
    held.

    Source: Chen, Grangier & Auli 2015, arXiv:1512.04906 (k-means with balanced frequencies).

    >>> import torch
    >>> vectors = torch.tensor([[0.0, 1.0], [1.0, 0.1], [0.1, 1.0], [1.0, 0.0]])
    >>> clusters = by_vectors(vectors, torch.ones(4), num_clusters=2, shortlist=0)
    >>> sorted(clusters.classes(cluster).tolist() for cluster in (0, 1))
    [[0, 2], [1, 3]]
    """
    counts = checks.class_counts(counts)
    vectors = checks.class_vectors(vectors, len(counts))
    rare = counts < checks.least_count(min_count)
    return _clusters(vectors, counts, rare, num_clusters, shortlist, largest_share, seed)


@on_cpu
def by_neighbours(
    tokens: Tensor,
    counts: Tensor,
    *,
    num_clusters: int | None = None,
    shortlist: int | None = None,
    largest_share: float | None = None,
    contexts: int = 512,
    dimensions: int = 64,
    min_count: float = 5,
    seed: int = 0,
) -> Clusters:
    """Returns clusters of classes that occur beside the same things.

    Counts how often each class occurs with each of the commonest contexts, in a stream of tokens
    just before it and just after it; takes the positive pointwise mutual information
    max(0, log(n_kj n / (n_k n_j))), its first principal directions, in which each class weighs
    √count, and the projections on them as vectors; and clusters these as `by_vectors` does. The
    table is sparse: the memory is that of the tokens and of the vectors.

    Args:
        tokens: (N) class indices in their order, such as the words of a text; or pairs (N, 2) of a
            class and a context that it occurs in. Contexts are any numbers that are not negative:
            classes, or users, documents, sessions. Use training data only.
        counts: (D), how often each class occurs, or frequencies. A class that was never seen counts
            like the rarest one that was.
        num_clusters, shortlist, largest_share: as in `by_vectors`.
        contexts: the number of the commonest contexts; in a stream of tokens so many before and so
            many after.
        dimensions: of the vectors; those of a table with fewer rows or columns have fewer.
        min_count: a class that occurs less often in the tokens is rare, as in `by_vectors`; one
            that never occurs counts like the rarest one that does. Beside each other, the rare
            classes that occur teach the layer how probable all of them are, while one that never
            occurs has almost no probability in a cluster by meaning. 0 stands for no rare classes.
        seed: of the decomposition and of k-means. The same arguments give the same clusters.

    Returns a `Clusters` on the CPU with the vectors (D, dimensions), in float32; zeros for a class
    that has none of the contexts.

    Raises ImportError without scikit-learn or SciPy, and TypeError or ValueError for tokens that
    are not classes in [0, D), and as `by_vectors` does.

    Source: Chen, Grangier & Auli 2015, arXiv:1512.04906; Levy & Goldberg 2014, "Neural word
    embedding as implicit matrix factorization" (positive pointwise mutual information).

    >>> import torch
    >>> tokens = torch.tensor([0, 2, 1, 3] * 50 + [0, 4, 1, 5] * 50)
    >>> counts = tokens.bincount()
    >>> clusters = by_neighbours(tokens, counts, num_clusters=2, shortlist=2)
    >>> sorted(clusters.classes(cluster).tolist() for cluster in (0, 1))
    [[2, 4], [3, 5]]
    """
    counts = checks.class_counts(counts)
    tokens = checks.tokens(tokens, len(counts))
    contexts = checks.at_least_one("contexts", contexts)
    dimensions = checks.at_least_one("dimensions", dimensions)
    min_count = checks.least_count(min_count)
    seed = checks.seed(seed)
    default_sizes(counts, shortlist=shortlist, num_clusters=num_clusters)
    vectors = neighbour_vectors(tokens, counts, contexts, dimensions, seed)
    own = tokens if tokens.dim() == 1 else tokens[:, 0]
    often = checks.class_counts(torch.bincount(own, minlength=len(counts)))
    rare = often < min_count
    return _clusters(vectors, counts, rare, num_clusters, shortlist, largest_share, seed)


def _clusters(
    vectors: Tensor,
    counts: Tensor,
    rare: Tensor,
    num_clusters: int | None,
    shortlist: int | None,
    largest_share: float | None,
    seed: int,
) -> Clusters:
    """`by_vectors` after checks of vectors and counts; `rare` classes have clusters of their own.

    rare: (D) bool.
    """
    seed = checks.seed(seed)
    sizes = default_sizes(counts, shortlist=shortlist, num_clusters=num_clusters)
    tail, C = counts.argsort(descending=True, stable=True)[sizes.shortlist :], sizes.num_clusters
    share = counts[tail] / counts[tail].sum()
    bound = _bound(share, C, largest_share)
    unit, rare = directions(vectors[tail]), rare[tail]
    R = clusters_of_rare(share, rare, bound, C) if bool(unit[~rare].any()) else 0
    met = ~rare if R else torch.ones_like(rare)
    known = unit.any(1) & met
    if not bool(known.any()):
        raise ValueError(
            "vectors must not be zero for every class outside the shortlist; without vectors use "
            "by_frequency, and by_neighbours needs tokens in which these classes have neighbours"
        )
    centres = spherical_centres(unit[known], share[known].sqrt(), C - R, seed)
    cluster = torch.empty(len(tail), dtype=torch.long)
    cluster[met] = within_bound(unit[met], centres, share[met], bound, C - R)
    if R:
        cluster[~met] = C - R + dealt_out(share[~met], R)
    return from_tail(counts, tail, cluster, vectors)


def _bound(share: Tensor, C: int, largest_share: float | None) -> float:
    """The largest share of a cluster: the one asked for, or the default."""
    least = min(1.0, 1 / C + float(share[0]))
    if largest_share is None:
        return max(SPREAD / C, least)
    why = "1/num_clusters plus the share of the commonest class outside the shortlist"
    return checks.largest_share(largest_share, least, why)
