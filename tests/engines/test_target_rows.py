"""What the targets add to the gradients of W and b, in each of the ways of adding it."""

from __future__ import annotations

import pytest
import torch

from _matrix_units import needs_triton, with_kernels, without_kernels
from softsphere.engines import target_rows
from softsphere.engines.target_rows import TargetRows, joined

m, K, D, d = 7, 3, 20, 5
# How rows are added, and whether a kernel adds them.
WAYS = [("by values", False), ("without values", False), ("by a kernel", True)]
CLASSES = {
    "all": slice(0, D),
    "a part": slice(4, 11),
    "the last": slice(15, D + 10),
    "in order": torch.arange(D),
    "some, repeated": torch.tensor([2, 3, 3, 3, 8, 19]),
}


def given():
    torch.manual_seed(0)
    target = torch.randint(D, (m, K))
    target[:, 2] = 3  # one that every row has
    return TargetRows(torch.randn(m, d), target, torch.randn(m, K))


def explicitly(rows):
    """Σ_ij [k = t_ij] g_ij [h_i 1] in float64."""
    out = torch.zeros(D, d + 1, dtype=torch.float64)
    for i in range(m):
        for j in range(K):
            h = torch.cat([rows.H[i], torch.ones(1)]).double()
            out[int(rows.target[i, j])] += float(rows.gc[i, j]) * h
    return out


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(("way", "kernels"), WAYS)
def test_rows_of_classes(way, kernels, classes, deterministic, monkeypatch):
    rows, some = given(), CLASSES[classes]
    if kernels:
        with_kernels(monkeypatch)
    else:
        without_kernels(monkeypatch)
    if way == "without values":
        monkeypatch.setattr(target_rows, "values_on_cpu", lambda _: False)
    every = torch.arange(D)[some] if isinstance(some, slice) else some
    found = torch.ones(len(every), d)
    rows.add_to(found, some, deterministic=deterministic)
    first = torch.searchsorted(every, every)
    torch.testing.assert_close(found[first], (1 + explicitly(rows)[every, :d]).float())


@pytest.mark.parametrize("deterministic", [False, True])
def test_entries_of_the_bias(deterministic):
    rows, found = given(), torch.ones(D, dtype=torch.float64)
    rows.add_to_bias(found, deterministic=deterministic)
    torch.testing.assert_close(found, 1 + explicitly(rows)[:, d])


def test_batches_with_as_many_targets_are_joined():
    rows = given()
    parts = [
        TargetRows(rows.H[part], rows.target[part, :count], rows.gc[part, :count])
        for part, count in ((slice(0, 2), 3), (slice(2, 7), 3), (slice(0, 4), 1))
    ]
    three, one = joined(parts)
    assert torch.equal(three.target, rows.target) and torch.equal(three.H, rows.H)
    assert one.target.shape == (4, 1) and joined([]) == []
