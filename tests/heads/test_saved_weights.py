"""A graph that saved a factored weight raises once the weight has changed, by whatever means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softsphere import ClusteredLoss, FactoredSphericalLoss
from softsphere.optim import FactoredSGD

d, D, m = 4, 30, 5
Layer = FactoredSphericalLoss | ClusteredLoss


def single() -> Layer:
    return FactoredSphericalLoss(d, D, bias=False, dtype=torch.float64)


def leaves() -> Layer:
    assignment = torch.arange(D) % 3
    return ClusteredLoss(d, D, assignment, bias=False, engine="factored", dtype=torch.float64)


def step(optimizer: type[torch.optim.Optimizer], **options: float) -> Callable[[Layer], object]:
    return lambda head: optimizer([head.weight], lr=0.5, **options).step()


CHANGES: dict[str, Callable[[Layer], object]] = {
    "FactoredSGD": step(FactoredSGD),
    "torch.optim.SGD": step(torch.optim.SGD),
    "load_state_dict": lambda head: head.load_state_dict(
        {key: x.clone() for key, x in head.state_dict().items()}
    ),
    "reset_parameters": lambda head: head.reset_parameters(),
    "an initialiser": lambda head: nn.init.normal_(head.weight),
}
GRAPHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the outputs": F.linear,
    "the norm": lambda x, W: W.norm() ** 2,
    "a row": lambda x, W: (W[3] ** 2).sum(),
    "the outputs of a row": lambda x, W: x @ W[3],
    "the transpose": lambda x, W: x @ W.T,
}


@pytest.mark.parametrize("make", [single, leaves])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_noticed(change, graph, make):
    head = make()
    x = torch.randn(m, d, dtype=torch.float64, requires_grad=True)
    head(x.detach(), torch.randint(D, (m,))).backward()
    value = GRAPHS[graph](x, head.weight).pow(2).sum()
    CHANGES[change](head)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_momentum_is_a_change_too():
    head = single()
    x = torch.randn(m, d, dtype=torch.float64, requires_grad=True)
    optimizer = FactoredSGD([head.weight], lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        head(x.detach(), torch.randint(D, (m,))).backward()
        value = F.linear(x, head.weight).pow(2).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
