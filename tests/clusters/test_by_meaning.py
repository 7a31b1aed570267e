"""Clusters of classes that are alike are found where they were planted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from softsphere import clusters
from softsphere.clusters import by_neighbours, by_vectors


def partition(assignment: torch.Tensor) -> set[frozenset[int]]:
    return {
        frozenset((assignment == c).nonzero().flatten().tolist())
        for c in range(int(assignment.max()) + 1)
    }


@pytest.mark.parametrize("seed", range(3))
def test_planted_directions_are_found_whatever_the_lengths(seed):
    g = torch.Generator().manual_seed(seed)
    group = torch.randint(6, (240,), generator=g)
    vectors = F.one_hot(group, 16) + 0.03 * torch.randn(240, 16, generator=g)
    vectors = vectors * torch.rand(240, 1, generator=g).add(0.1).pow(3)
    counts = 100 / torch.rand(240, generator=g).add(0.1)
    found = by_vectors(vectors, counts, num_clusters=6, shortlist=0, seed=seed)
    assert partition(found.assignment) == partition(group)
    assert torch.equal(found.vectors, vectors)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_whose_squares_float32_cannot_hold_change_nothing(scale):
    vectors = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(1, 101)
    plain = by_vectors(vectors, counts, num_clusters=5)
    scaled = by_vectors(vectors * scale, counts, num_clusters=5)
    assert torch.equal(plain.assignment, scaled.assignment)
    torch.testing.assert_close(plain.rows(4), scaled.rows(4))


def test_the_weight_of_an_embedding_may_be_given_and_trained_on():
    embedding = torch.nn.Embedding(20, 4, dtype=torch.float32)
    found = by_vectors(embedding.weight, torch.ones(20), num_clusters=3, shortlist=0)
    before = found.vectors.clone()
    with torch.no_grad():
        embedding.weight.zero_()
    assert torch.equal(found.vectors, before)


def test_the_default_dtype_changes_nothing():
    tokens, _ = text()
    counts = tokens.bincount()
    expected = by_neighbours(tokens, counts, num_clusters=4)
    torch.set_default_dtype(torch.float64)
    try:
        found = by_neighbours(tokens, counts, num_clusters=4)
        assert torch.equal(found.assignment, expected.assignment)
        assert found.vectors.dtype == torch.float32
        assert torch.equal(found.rows(99), expected.rows(99))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_changes_nothing():
    tokens, _ = text()
    counts = tokens.bincount()
    expected = by_neighbours(tokens, counts, num_clusters=4)
    with torch.device("meta"):
        found = by_neighbours(tokens, counts, num_clusters=4)
        rows = found.rows(99)
        by_counts = clusters.by_frequency(counts, num_clusters=4)
        sizes = clusters.default_sizes(counts)
    assert torch.equal(found.assignment, expected.assignment)
    assert torch.equal(rows, expected.rows(99))
    expected = clusters.by_frequency(counts, num_clusters=4)
    assert torch.equal(by_counts.assignment, expected.assignment)
    assert sizes == clusters.default_sizes(counts)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Words 0 – 3 are common; each of the words 4 – 43 comes after one of them, and before one."""
    g = torch.Generator().manual_seed(0)
    word = torch.randint(40, (4000,), generator=g)
    group = word % 4
    return torch.stack([group, word + 4, (group + 1) % 4], 1).flatten(), group


def test_words_with_the_same_neighbours_are_found():
    tokens, _ = text()
    found = by_neighbours(tokens, tokens.bincount(), num_clusters=4, shortlist=4)
    assert found.classes(-1).tolist() == tokens.bincount().argsort(descending=True)[:4].tolist()
    assert partition(found.assignment) == {frozenset(range(4 + c, 44, 4)) for c in range(4)}


def with_rare_words() -> tuple[torch.Tensor, torch.Tensor]:
    """`text` with the words 44 – 143 once each, and the counts of 1,000 words."""
    tokens, _ = text()
    tokens[torch.arange(0, 3 * 4000, 120) + 1] = 44 + torch.arange(100)
    return tokens, tokens.bincount(minlength=1000)


def are_apart(assignment: torch.Tensor) -> bool:
    """Whether no word from 44 on shares a cluster with another word."""
    return not set(assignment[44:].tolist()) & set(assignment[:44].tolist())


@pytest.mark.parametrize("factor", [None, 1.02])
def test_rare_words_share_clusters_of_their_own(factor):
    tokens, counts = with_rare_words()
    share = counts.clamp_min(1)[4:] / counts.clamp_min(1)[4:].sum()
    bound = 4 / 16 if factor is None else factor * (1 / 16 + float(share.max()))
    given = None if factor is None else bound
    found = by_neighbours(tokens, counts, num_clusters=16, shortlist=4, largest_share=given)
    assert are_apart(found.assignment)
    assert float(found.shares.max()) <= bound
    # as few clusters as hold them
    of_rare = found.assignment[44:].unique()
    assert len(of_rare) == {None: 1, 1.02: 3}[factor]
    # each with its part of the words that occur, and of those that never do
    for words in (found.assignment[44:144], found.assignment[144:]):
        sizes = words.bincount(minlength=16)[of_rare]
        assert sizes.max() - sizes.min() <= 1


def test_rare_words_that_do_not_fill_a_cluster_join_the_others():
    tokens, _ = text()
    tokens[1] = 44
    counts = tokens.bincount(minlength=46)
    found = by_neighbours(tokens, counts, num_clusters=4, shortlist=4)
    none = by_neighbours(tokens, counts, num_clusters=4, shortlist=4, min_count=0)
    assert torch.equal(found.assignment, none.assignment)
    assert found.assignment[44] in found.assignment[4:44]


def test_what_is_rare_is_told_by_the_counts_beside_vectors():
    tokens, counts = with_rare_words()
    sizes = {"num_clusters": 16, "shortlist": 4}
    found = by_neighbours(tokens, counts, **sizes)
    again = by_vectors(found.vectors, counts, **sizes, min_count=5)
    assert torch.equal(again.assignment, found.assignment)
    total = float(counts.sum())
    shares = by_vectors(found.vectors, counts / total, **sizes, min_count=5 / total)
    assert are_apart(shares.assignment) and len(shares.assignment[44:].unique()) == 1
    # without rare words they are wherever there is room
    for without in (
        by_vectors(found.vectors, counts, **sizes),
        by_neighbours(tokens, counts, **sizes, min_count=1),
    ):
        assert len(without.assignment[44:].unique()) > 3


def test_items_of_the_same_users_are_found():
    g = torch.Generator().manual_seed(0)
    item = torch.randint(40, (4000,), generator=g)
    user = (item % 4) * 1000 + torch.randint(10, (4000,), generator=g)
    pairs = torch.stack([item, user], 1)
    found = by_neighbours(pairs, item.bincount(), num_clusters=4, shortlist=0)
    assert partition(found.assignment) == {frozenset(range(c, 40, 4)) for c in range(4)}


def test_the_same_arguments_give_the_same_clusters_and_the_caller_keeps_its_random_state():
    torch.manual_seed(5)
    g = torch.Generator().manual_seed(0)
    tokens = (torch.rand(20_000, generator=g) ** 3 * 300).long()
    counts = tokens.bincount(minlength=300)
    before = torch.get_rng_state()
    one = by_neighbours(tokens, counts, num_clusters=8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again = by_neighbours(tokens, counts, num_clusters=8, seed=3)
    assert torch.equal(one.assignment, again.assignment)
    assert torch.equal(one.vectors, again.vectors)
    deficient, _ = text()
    vectors = [by_neighbours(deficient, deficient.bincount()).vectors for _ in range(3)]
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2])
    by_their_vectors = by_vectors(one.vectors, counts, num_clusters=8, seed=3)
    assert torch.equal(one.assignment, by_their_vectors.assignment)
    other = by_neighbours(tokens, counts, num_clusters=8, seed=4)
    assert not torch.equal(one.assignment, other.assignment)


def test_sizes_are_those_of_the_cost_model_by_default():
    tokens, _ = text()
    counts = tokens.bincount()
    found = by_neighbours(tokens, counts)
    assert (found.shortlist, found.num_clusters) == clusters.default_sizes(counts)


@pytest.mark.parametrize("module", ["sklearn.cluster", "scipy.sparse", "threadpoolctl"])
def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    tokens, _ = text()
    with pytest.raises(ImportError, match=r"pip install scikit-learn scipy"):
        by_neighbours(tokens, tokens.bincount(), num_clusters=4)


def test_the_library_and_clusters_by_frequency_need_no_extra():
    program = (
        "import sys, torch, softsphere\n"
        "before = set(sys.modules)\n"
        "softsphere.clusters.by_frequency(torch.arange(1, 99))\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & "
        "{'sklearn', 'scipy', 'threadpoolctl', 'joblib'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b""
