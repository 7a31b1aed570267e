"""Refuses the optimizers of PyTorch that cannot step a factored weight, before they step.

The table refuses an operation when it is reached. By then an optimizer with several groups of
parameters has moved the first group, so optimizers are asked by a hook that runs before each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from softsphere.matrix.refusals import ADAPTIVE, MOMENTUM
from softsphere.matrix.tensors import FactoredTensor

__all__ = ["refuse_step"]


def refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Checks an optimizer before its step, and again after a closure has made the gradients."""
    _refuse(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    def checked_closure() -> Any:
        loss = closure()
        _refuse(optimizer)
        return loss

    return (args[0], checked_closure), {}


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError if an optimizer of torch.optim cannot step a factored weight it has."""
    known = [kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim")]
    kind = known[0]
    if kind is torch.optim.Optimizer:
        return  # an unknown one may well do only what the table allows
    plain = kind is torch.optim.SGD
    for group in optimizer.param_groups:
        if plain and not group["momentum"]:
            continue
        if any(isinstance(p, FactoredTensor) and p.grad is not None for p in group["params"]):
            why = MOMENTUM if plain else ADAPTIVE
            raise TypeError(f"torch.optim.{kind.__name__} cannot step a factored weight: {why}")


register_optimizer_step_pre_hook(refuse_step)
