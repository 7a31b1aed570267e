"""Statistics of logits: the memory that they take beside the logits, and parts of rows."""

from __future__ import annotations

import pytest
import torch

from _bytes import most_bytes
from _engines import SPHERICAL
from softsphere.engines import row_statistics
from softsphere.functional import spherical_loss

PRIORS = [False, True]


@pytest.mark.once("rows are taken in parts on a CPU alone")
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", SPHERICAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memory_beside_the_logits(name, dtype, prior, monkeypatch):
    """The gradient, of one size, and copies of a part of the rows."""
    monkeypatch.setattr(row_statistics, "ON_CPU", 1 << 14)
    logits = torch.randn(64, 4096).to(dtype)
    target = torch.randint(4096, (64,))
    pi = torch.rand(4096) + 0.1 if prior else None
    assert most_bytes(SPHERICAL[name], logits, target, prior=pi) < 1.9


@pytest.mark.parametrize("shape", [(64, 50), (64, 50, 3), (3, 50), (1, 5000)])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", SPHERICAL)
def test_parts_of_the_rows_change_nothing(name, prior, shape, monkeypatch):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.randint(50, (shape[0], *shape[2:]))
    pi = torch.rand(shape[1]) + 0.1 if prior else None
    found = []
    for size in (1 << 20, 170, 1):
        monkeypatch.setattr(row_statistics, "ON_CPU", size)
        leaf = logits.clone().requires_grad_()
        rows = spherical_loss(leaf, target, SPHERICAL[name], prior=pi, reduction="none")
        rows.float().sum().backward()
        found.append((rows.detach(), leaf.grad))
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-2, atol=1e-6)
