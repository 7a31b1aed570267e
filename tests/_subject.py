"""A small model whose output layer is one of several kinds, with its own stream of batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
    SphericalLoss,
)
from softsphere.optim import FactoredSGD

d, D, m, LR = 5, 23, 6, 0.5
# The numbers of a layer with one cluster are those of its leaf.
ONE_CLUSTER = torch.zeros(D, dtype=torch.long)


class Plain(nn.Linear):
    """nn.Linear and a criterion on its outputs."""

    loss = "taylor_softmax"

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return SphericalLoss(self.loss)(super().forward(hidden), target)

    def log_prob(self, hidden: Tensor) -> Tensor:
        return SphericalLoss(self.loss).log_prob(super().forward(hidden))


class PlainSoftmax(Plain):
    loss = "softmax"


KINDS: dict[str, Callable[..., nn.Module]] = {
    "plain": lambda **k: Plain(d, D, **k),
    "linear": lambda **k: LinearSphericalLoss(d, D, **k),
    "factored": lambda **k: FactoredSphericalLoss(d, D, **k),
    "clustered": lambda **k: ClusteredLoss(d, D, ONE_CLUSTER, **k),
    "plain softmax": lambda **k: PlainSoftmax(d, D, **k),
    # with every class as a negative, so that its numbers are those of softmax
    "sampled": lambda **k: SampledSoftmaxLoss(d, D, num_samples=D, **k),
}
# What each kind of output layer is compared with.
LIKE = {
    "linear": "plain",
    "factored": "plain",
    "clustered": "plain",
    "sampled": "plain softmax",
}


class Model(nn.Module):
    """A hidden layer and an output layer. A test may replace `between` to see hidden states."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.trunk = nn.Linear(d, d)
        self.head = KINDS[kind](bias=bias)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.head(self.between(self.trunk(x)), target)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


class Subject:
    """A float64 model with the same weights and the same batches for every kind of layer."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        self.kind, self.bias = kind, bias
        self.model = Model(kind, bias).double()
        torch.manual_seed(0)  # the layers draw as many numbers as they like
        first = nn.Linear(d, D, bias=bias).double()
        trunk = nn.Linear(d, d).double()
        keys = self.model.head.load_state_dict(first.state_dict(), strict=False)
        assert not keys.unexpected_keys
        self.model.trunk.load_state_dict(trunk.state_dict())
        self.generator = torch.Generator().manual_seed(1)

    @property
    def head(self) -> nn.Module:
        return self.model.head

    @property
    def W(self) -> Tensor:
        return dense(self.head)

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(m, d, generator=self.generator, dtype=torch.float64)
        return x, torch.randint(D // 2, (m,), generator=self.generator)

    def loss(self) -> Tensor:
        return self.model(*self.batch())

    def sgd(self, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), **{"lr": LR, **options})

    def with_momentum(self, **options: Any) -> torch.optim.Optimizer:
        """FactoredSGD for a factored layer, torch.optim.SGD for the others."""
        kind = FactoredSGD if self.kind == "factored" else torch.optim.SGD
        return kind(self.model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})

    def train(self, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        optimizer = optimizer or self.sgd()
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

    def numbers(self) -> dict[str, Tensor]:
        return {"W": self.W, "trunk": self.model.trunk.weight.detach().clone()}

    def trained(self, steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trains, then returns the numbers."""
        self.train(steps, optimizer)
        return self.numbers()


def dense(head: nn.Module) -> Tensor:
    """[W b] as a new tensor."""
    if isinstance(head, FactoredSphericalLoss):
        return head.dense()
    columns = [head.weight.detach()] + ([] if head.bias is None else [head.bias[:, None].detach()])
    return torch.cat(columns, 1)
