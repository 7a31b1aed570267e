"""Statistics of logits: the memory that they take beside the logits, and parts of rows."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from _engines import SPHERICAL
from softsphere.engines import row_statistics
from softsphere.functional import spherical_loss

PRIORS = [False, True]


class Bytes(TorchDispatchMode):
    """The most bytes of the tensors that were made meanwhile and existed at once."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_iter(result) if isinstance(x, Tensor)]
        alive = [x for x in (ref() for ref in self.made) if x is not None]
        self.made = [weakref.ref(x) for x in alive]
        stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
        self.most = max(self.most, sum(n for at, n in stores.items() if at not in self.known))
        return result


def most_bytes(loss: str, logits: Tensor, target: Tensor, prior: Tensor | None) -> float:
    """The memory of a loss and its gradient, in sizes of the logits."""
    logits = logits.detach().requires_grad_()
    with Bytes(logits, target) as meter:
        spherical_loss(logits, target, loss, prior=prior).backward()
    assert logits.grad is not None
    return meter.most / logits.untyped_storage().nbytes()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", SPHERICAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memory_beside_the_logits(name, dtype, prior, monkeypatch):
    """The gradient, of one size, and copies of a part of the rows."""
    monkeypatch.setattr(row_statistics, "ON_CPU", 1 << 14)
    logits = torch.randn(64, 4096).to(dtype)
    target = torch.randint(4096, (64,))
    pi = torch.rand(4096) + 0.1 if prior else None
    assert most_bytes(SPHERICAL[name], logits, target, pi) < 1.9


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
