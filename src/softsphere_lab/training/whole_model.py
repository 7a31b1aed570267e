"""A network and its output layer, which are trained and measured as one."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from softsphere_lab.models.output_layers import Ranks
from softsphere_lab.training.text_parts import rows_at_once

__all__ = ["WholeModel"]

State = TypeVar("State")


class WholeModel:
    """A network and its output layer in one process."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        self.network, self.head = network, head

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean loss of a batch of inputs x (N, …) with targets y (N, …)."""
        loss: Tensor = self.head(self.network(x), y)
        return loss

    def rank(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the rank of each target y (N, …) given the inputs x (N, …), as one row."""
        return cast(Ranks, self.head).rank(self.network(x), y).flatten()

    def clip(self, most: float) -> None:
        """Scales all gradients by one factor, so that their norm is at most `most`."""
        parameters = [*self.network.parameters(), *self.head.parameters()]
        nn.utils.clip_grad_norm_(parameters, most)

    def whole(self, state: State) -> State:
        """Returns a state of modules or optimizers with the tensors of all processes."""
        return state

    @torch.no_grad()
    def mean_loss(self, x: Tensor, y: Tensor) -> float:
        """Returns the mean loss over all words of y, in evaluation mode."""
        self._evaluate()
        size, total = rows_at_once(y), 0.0
        for part, target in zip(x.split(size), y.split(size), strict=True):
            total += float(self.loss(part, target)) * target.numel()
        return total / y.numel()

    @torch.no_grad()
    def every_rank(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the rank of each word of y, in evaluation mode."""
        self._evaluate()
        size = rows_at_once(y)
        pairs = zip(x.split(size), y.split(size), strict=True)
        return torch.cat([self.rank(part, target) for part, target in pairs])

    def _evaluate(self) -> None:
        self.network.eval()
        self.head.eval()
