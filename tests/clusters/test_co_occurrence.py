"""The table of neighbours, against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from softsphere.clusters import co_occurrence


def stream(N: int = 400, D: int = 12) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(N, generator=g) ** 2 * D).long()


def naive_stream(tokens: torch.Tensor, D: int, contexts: int) -> torch.Tensor:
    counts = tokens.bincount(minlength=D).tolist()
    chosen = sorted(range(D), key=lambda k: -counts[k])[:contexts]
    table = torch.zeros(D, 2 * len(chosen))
    words = tokens.tolist()
    for before, after in itertools.pairwise(words):
        if before in chosen:
            table[after, chosen.index(before)] += 1
        if after in chosen:
            table[before, len(chosen) + chosen.index(after)] += 1
    return table


def dense(tokens: torch.Tensor, D: int, contexts: int) -> torch.Tensor:
    counts = tokens.bincount(minlength=D).double() if tokens.dim() == 1 else torch.ones(D)
    return torch.from_numpy(co_occurrence._table(tokens, counts, contexts).toarray())


@pytest.mark.parametrize("contexts", [1, 3, 12, 512])
@pytest.mark.parametrize("part", [2**22, 7])
def test_neighbours_are_counted_before_and_after(monkeypatch, contexts, part):
    monkeypatch.setattr(co_occurrence, "PART", part)
    assert torch.equal(dense(stream(), 12, contexts), naive_stream(stream(), 12, contexts))


@pytest.mark.parametrize("part", [2**22, 7])
def test_pairs_are_counted_by_their_commonest_contexts(monkeypatch, part):
    monkeypatch.setattr(co_occurrence, "PART", part)
    users = torch.tensor([10**12, 5, 0])
    pairs = torch.tensor([[3, 0], [3, 1], [1, 1], [3, 1], [0, 2], [2, 0]] * 3)
    pairs = torch.stack([pairs[:, 0], users[pairs[:, 1]]], 1)
    # 5 is commonest, and of those left 10**12
    expected = torch.tensor([[0, 0], [3, 0], [0, 3], [6, 3]]).float()
    assert torch.equal(dense(pairs, 4, 2), expected)


def test_entries_are_the_positive_information_of_the_definition():
    table = naive_stream(stream(), 12, 5)
    row, column, total = table.sum(1) + 1, table.sum(0) + 1, float(table.sum())
    expected = torch.tensor(
        [
            [max(0.0, math.log(max(n * total / (float(r) * float(c)), 1e-300)))
             for n, c in zip(entries.tolist(), column, strict=True)]
            for entries, r in zip(table, row, strict=True)
        ]
    )  # fmt: skip
    counts = stream().bincount(minlength=12).double()
    found = co_occurrence._positive_information(co_occurrence._table(stream(), counts, 5))
    assert found.nnz < found.shape[0] * found.shape[1]
    torch.testing.assert_close(torch.from_numpy(found.toarray()), expected.float())


def test_vectors_keep_the_products_of_the_rows_when_no_direction_is_left_out():
    tokens = stream()
    counts = tokens.bincount(minlength=12).double()
    information = co_occurrence._positive_information(co_occurrence._table(tokens, counts, 3))
    rows = torch.from_numpy(information.toarray()).double()
    found = co_occurrence.neighbour_vectors(tokens, counts, 3, 64, 0).double()
    assert found.shape == (12, 6)
    torch.testing.assert_close(found @ found.T, rows @ rows.T, atol=1e-4, rtol=1e-4)


def test_directions_are_the_principal_ones_of_rows_weighted_by_their_counts():
    """Half of the classes have one kind of context, and half another; one half is common."""
    pairs = torch.tensor([[k, 10 * (k % 2) + j] for k in range(20) for j in range(10)])
    for common in (0, 1):
        counts = torch.where(torch.arange(20) % 2 == common, 10_000, 1).double()
        found = co_occurrence.neighbour_vectors(pairs, counts, 20, 1, 0)
        of_half = found.norm(dim=1).view(10, 2).mean(0)
        assert found.shape == (20, 1)
        assert float(of_half[common]) > 100 * float(of_half[1 - common])


def test_a_table_without_entries_has_vectors_of_zeros():
    assert not co_occurrence.neighbour_vectors(torch.tensor([[0, 1]]), torch.ones(3), 5, 4, 0).any()
