"""What cannot be clustered is refused by name, with what would do."""

from __future__ import annotations

import re

import pytest
import torch

from softsphere.clusters import (
    Clusters,
    by_frequency,
    by_neighbours,
    by_vectors,
    default_sizes,
)

COUNTS = torch.tensor([5.0, 4.0, 3.0, 2.0])
VECTORS = torch.eye(4)
TOKENS = torch.tensor([0, 1, 2, 3, 0, 1])
NAN, INF = float("nan"), float("inf")

# Every function that takes counts takes them in the same way.
OF_COUNTS = {
    "by_frequency": by_frequency,
    "by_vectors": lambda counts, **options: by_vectors(VECTORS, counts, **options),
    "by_neighbours": lambda counts, **options: by_neighbours(TOKENS, counts, **options),
    "default_sizes": default_sizes,
}

WRONG_COUNTS = {
    "counts must be zero or positive, and finite, for every class, got -1 for class 2": (
        torch.tensor([5.0, 4.0, -1.0, 2.0])
    ),
    "got nan for class 0": torch.tensor([NAN, 4.0, 1.0, 2.0]),
    "got inf for class 3": torch.tensor([1.0, 4.0, 1.0, INF]),
    "counts must be positive for some class, got zeros only": torch.zeros(4),
    "counts must have a finite sum, got up to 1e+308": torch.full((4,), 1e308, dtype=torch.float64),
    "counts must have shape (num_classes,), got (2, 2); for a stream": torch.ones(2, 2),
    "counts must have shape (num_classes,), got (0,)": torch.ones(0),
}

WRONG_COUNTS_TYPE = {
    "counts must be a tensor of class counts or frequencies, got a list of length 2": [1, 2],
    "counts must be a tensor of class counts": torch.tensor([True, False]),
    "counts must be a dense tensor, got layout torch.sparse_coo": COUNTS.to_sparse(),
}

WRONG_SIZES = {
    "shortlist must be from 0 to num_classes − 1 = 3, got 4; with all classes": {"shortlist": 4},
    "shortlist must be from 0 to num_classes − 1 = 3, got -1": {"shortlist": -1},
    "num_clusters must be at least 1, got 0": {"num_clusters": 0},
    "num_clusters must be at most 2, the number of classes outside the shortlist, got 3": {
        "shortlist": 2,
        "num_clusters": 3,
    },
    "num_clusters must be at most 4": {"num_clusters": 5},
}

WRONG = {
    "vectors must have shape (num_classes = 4, n), one row per entry of counts, got (3, 2)": (
        lambda: by_vectors(torch.ones(3, 2), COUNTS)
    ),
    "n), one row per entry of counts, got (4,)": lambda: by_vectors(torch.ones(4), COUNTS),
    "n), one row per entry of counts, got (4, 0)": lambda: by_vectors(torch.ones(4, 0), COUNTS),
    "vectors must be finite in float32 for every class, got [1.0, nan] for class 0": (
        lambda: by_vectors(torch.tensor([[1.0, NAN], [1.0, 1.0]]), COUNTS[:2])
    ),
    "got [inf] for class 1": lambda: by_vectors(torch.tensor([[1], [1e300]]).double(), COUNTS[:2]),
    "vectors must not be zero for every class outside the shortlist": (
        lambda: by_vectors(torch.zeros(4, 3), COUNTS)
    ),
    "outside the shortlist; without vectors use by_frequency": (
        lambda: by_neighbours(torch.tensor([[0, 1]]), COUNTS, shortlist=1)
    ),
    "largest_share must be from 0.858, 1/num_clusters plus the share of the commonest class "
    "outside the shortlist, to 1, got 0.6; take a larger": (
        lambda: by_vectors(VECTORS, COUNTS, num_clusters=2, shortlist=0, largest_share=0.6)
    ),
    "to 1, got 1.5": lambda: by_vectors(VECTORS, COUNTS, largest_share=1.5),
    "largest_share must be finite, got nan": (
        lambda: by_vectors(VECTORS, COUNTS, largest_share=NAN)
    ),
    "tokens must hold classes in [0, num_classes = 4), one for each entry of counts, got 4; map": (
        lambda: by_neighbours(TOKENS + 1, COUNTS)
    ),
    "of counts, got -1; map unknown tokens": lambda: by_neighbours(TOKENS - 1, COUNTS),
    "of counts, got 7; map": lambda: by_neighbours(torch.tensor([[7, 0]]), COUNTS),
    "tokens must hold contexts that are not negative in its second column, got -1": (
        lambda: by_neighbours(torch.tensor([[3, -1]]), COUNTS)
    ),
    "of shape (N, 2) with N ≥ 1, got (6, 1)": lambda: by_neighbours(TOKENS[:, None], COUNTS),
    "N ≥ 1, got (1,)": lambda: by_neighbours(TOKENS[:1], COUNTS),
    "N ≥ 1, got (0, 2)": lambda: by_neighbours(torch.zeros(0, 2).long(), COUNTS),
    "contexts must be at least 1, got 0": lambda: by_neighbours(TOKENS, COUNTS, contexts=0),
    "dimensions must be at least 1, got 0": lambda: by_neighbours(TOKENS, COUNTS, dimensions=0),
    "assignment must hold clusters 0, 1, …, or −1 for the shortlist, got -2": (
        lambda: Clusters(torch.tensor([0, -2]), COUNTS[:2])
    ),
    "assignment must have shape (num_classes,), the cluster of each class or −1 for the shortlist, "
    "got (1, 2)": (lambda: Clusters(torch.tensor([[0, 1]]), COUNTS[:2])),
    "counts must have one entry for each of the 2 entries of assignment, got 4": (
        lambda: Clusters(torch.tensor([0, 1]), COUNTS)
    ),
    "vectors must have shape (num_classes = 2, n)": (
        lambda: Clusters(torch.tensor([0, 1]), COUNTS[:2], VECTORS)
    ),
    "cluster must be from 0 to 1, or −1 for the shortlist, got 2": lambda: plain().classes(2),
    "rows are made from vectors, and these clusters have none": lambda: plain().rows(3),
    "seed must be from 0 to 2**32 − 1, got -1": lambda: by_vectors(VECTORS, COUNTS, seed=-1),
    "min_count must be zero or positive, and finite, got -1": lambda: by_neighbours(
        TOKENS, COUNTS, min_count=-1
    ),
    "min_count must be zero or positive, and finite, got nan": lambda: by_vectors(
        VECTORS, COUNTS, min_count=float("nan")
    ),
    "− 1, got 4294967296": lambda: by_neighbours(TOKENS, COUNTS, seed=2**32),
    "2**32 − 1, got -2": lambda: with_vectors().rows(3, seed=-2),
    "width must be at least 1, got 0": lambda: with_vectors().rows(0),
    "std must be positive and finite, got 0": lambda: with_vectors().rows(3, 0.0),
}

WRONG_TYPE = {
    "tokens must be a tensor of class indices (torch.int64), got torch.float32": (
        lambda: by_neighbours(COUNTS, COUNTS)
    ),
    "tokens must be a tensor of class indices (torch.int64), got a list of length 2": (
        lambda: by_neighbours([0, 1], COUNTS)
    ),
    "vectors must be a floating-point tensor, got torch.int64": (
        lambda: by_vectors(VECTORS.long(), COUNTS)
    ),
    "shortlist must be an integer, got 1.5": lambda: by_frequency(COUNTS, shortlist=1.5),
    "num_clusters must be an integer, got 'many'": (
        lambda: by_frequency(COUNTS, num_clusters="many")
    ),
    "largest_share must be a number, got '4'": (
        lambda: by_vectors(VECTORS, COUNTS, largest_share="4")
    ),
    "seed must be an integer, got None": lambda: by_vectors(VECTORS, COUNTS, seed=None),
    "assignment must be a tensor of cluster indices (torch.int64), got torch.float32": (
        lambda: Clusters(COUNTS, COUNTS)
    ),
    "vectors must be True or False, got 1": lambda: plain().save("nowhere", vectors=1),
}


def plain() -> Clusters:
    return Clusters(torch.tensor([0, 1]), COUNTS[:2])


def with_vectors() -> Clusters:
    return Clusters(torch.tensor([0, 1]), COUNTS[:2], VECTORS[:2])


@pytest.mark.parametrize("function", OF_COUNTS)
@pytest.mark.parametrize("message", WRONG_COUNTS)
def test_wrong_counts(function, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OF_COUNTS[function](WRONG_COUNTS[message])


@pytest.mark.parametrize("function", OF_COUNTS)
@pytest.mark.parametrize("message", WRONG_COUNTS_TYPE)
def test_wrong_kinds_of_counts(function, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        OF_COUNTS[function](WRONG_COUNTS_TYPE[message])


@pytest.mark.parametrize("function", OF_COUNTS)
@pytest.mark.parametrize("message", WRONG_SIZES)
def test_wrong_sizes(function, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OF_COUNTS[function](COUNTS, **WRONG_SIZES[message])


@pytest.mark.parametrize("message", WRONG)
def test_wrong_values(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message]()


@pytest.mark.parametrize("message", WRONG_TYPE)
def test_wrong_types(message):
    with pytest.raises(TypeError, match=re.escape(message)):
        WRONG_TYPE[message]()
