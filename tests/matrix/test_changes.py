"""With a base measure, changes of the weight change diag(√π) [W b]."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from _one_batch import D, layer, rows, target
from softsphere import SphericalLoss
from softsphere.matrix import rows as matrix_rows


@pytest.fixture
def pair():
    """A head with a prior and the dense parameter that it is, under the same loss."""
    counts = torch.arange(1.0, D + 1).double()
    head = layer(prior=counts)
    dense = nn.Parameter(head.weight.to_dense())
    root = head.base_measure.sqrt().unsqueeze(1)
    criterion = SphericalLoss("taylor_softmax", prior=counts)
    H = nn.functional.pad(rows, (0, 1), value=1.0)
    return head, dense, lambda: criterion(H @ (dense / root).T, target)


def own(part):
    """A part of the weight itself. PyTorch wants a copy where it is one of an ordinary tensor."""
    return part.clone() if type(part) is torch.Tensor else part


CHANGES = {
    "scaled": lambda w: w.mul_(0.5),
    "shifted": lambda w: w.add_(0.25),
    "another added": lambda w: w.add_(torch.ones(1, w.shape[1]).double(), alpha=0.1),
    "lerp": lambda w: w.lerp_(torch.ones(w.shape).double(), 0.25),
    "filled": lambda w: w.fill_(0.3),
    "a row": lambda w: w[3].zero_(),
    "rows": lambda w: w.index_put_((torch.tensor([2, 5]),), torch.tensor(0.5).double()),
    "a column": lambda w: w[:, -1].fill_(0.1),
    "a clone": lambda w: w.copy_(w.clone() * 2),
    "its own row added": lambda w: w.add_(own(w.detach()[0])),
    "its own row taken": lambda w: w.sub_(own(w.detach()[0:1]), alpha=0.5),
    "an entry of its own added": lambda w: w.add_(own(w.detach()[0, 0])),
    "filled with an entry of its own": lambda w: w.fill_(own(w.detach()[0, 0])),
    "its own row everywhere": lambda w: w.copy_(own(w.detach()[5])),
    "lerp to its own row": lambda w: w.lerp_(own(w.detach()[5]).expand(w.shape), 0.25),
    "a row to another": lambda w: w[5].copy_(own(w.detach()[2])),
    "tiny": lambda w: w.mul_(1e-200).add_(1.0),
}


@pytest.mark.parametrize("chunk", ["one chunk", "chunks of two rows"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_is_written_into_the_scaled_weight(pair, change, chunk, monkeypatch):
    head, dense, loss = pair
    if chunk != "one chunk":
        monkeypatch.setattr(matrix_rows, "_CHUNK_BYTES", 2 * head.weight[0].numel() * 8)
    with torch.no_grad():
        CHANGES[change](head.weight)
        CHANGES[change](dense)
    torch.testing.assert_close(head.weight.to_dense(), dense.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.weight.norm(), dense.norm())
    torch.testing.assert_close(head.weight[4:6].clone(), dense[4:6].detach())
    penalised = head(rows, target) + 0.1 * head.weight.norm() ** 2
    (loss() + 0.1 * dense.norm() ** 2).backward()
    penalised.backward()
    torch.testing.assert_close(head.weight.grad.to_dense(), dense.grad, rtol=1e-9, atol=1e-11)
    for each in (head.weight, dense):
        torch.optim.SGD([each], lr=0.3, weight_decay=0.1).step()
    torch.testing.assert_close(head.weight.to_dense(), dense.detach(), rtol=1e-10, atol=1e-10)
