"""Which of PyTorch's own optimizers cannot step a factored weight, said before any of them moves.

The table refuses an operation when it is reached. An optimizer with several groups of parameters
has moved the first by then, so it is asked before its step, by a hook that PyTorch has for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from softsphere.matrix.refusals import ADAPTIVE, MOMENTUM
from softsphere.matrix.tensors import FactoredTensor

__all__ = ["refuse_step"]


def refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Asks before the step, and again when a closure has made the gradients."""
    refuse(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    def asked() -> Any:
        loss = closure()
        refuse(optimizer)
        return loss

    return (args[0], asked), {}


def refuse(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError where an optimizer of torch.optim could not step a factored weight."""
    known = [kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim")]
    kind = known[0]
    if kind is torch.optim.Optimizer:
        return  # one that nobody knows of may well do what the table allows
    plain = kind is torch.optim.SGD
    for group in optimizer.param_groups:
        if plain and not group["momentum"]:
            continue
        if any(isinstance(p, FactoredTensor) and p.grad is not None for p in group["params"]):
            why = MOMENTUM if plain else ADAPTIVE
            raise TypeError(f"torch.optim.{kind.__name__} cannot step a factored weight: {why}")


register_optimizer_step_pre_hook(refuse_step)
