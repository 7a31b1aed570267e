"""Refuses the optimizers of PyTorch that cannot step a factored weight, before they step.

The table refuses an operation when it is reached. By then an optimizer with several groups of
parameters has moved the first group, so optimizers are asked by a hook that runs before each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from softsphere.matrix.refusals import BY_SGD, MOMENTUM
from softsphere.matrix.tensors import FactoredTensor

__all__ = ["refuse_step"]


def refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Checks an optimizer before its step, and again after a closure has made the gradients.

    Returns None, which leaves the arguments of the step as they are, or the same arguments with a
    closure that checks. The hook runs for every optimizer of the process, so that all others step
    as if it did not exist.
    """
    if not _has_factored(optimizer):
        return None
    _refuse(optimizer)
    if callable(closure := kwargs.get("closure")):
        return args, {**kwargs, "closure": _checked(closure, optimizer)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _checked(args[1], optimizer), *args[2:]), kwargs
    return None


def _checked(closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def run() -> Any:
        loss = closure()
        _refuse(optimizer)
        return loss

    return run


def _has_factored(optimizer: torch.optim.Optimizer) -> bool:
    groups = optimizer.param_groups
    return any(isinstance(p, FactoredTensor) for group in groups for p in group["params"])


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError if an optimizer of torch.optim cannot step a factored weight it has."""
    kinds = type(optimizer).__mro__
    kind = next(kind for kind in kinds if kind.__module__.startswith("torch.optim"))
    if kind is torch.optim.Optimizer:
        return  # an unknown one may well do only what the table allows
    plain = kind is torch.optim.SGD
    for group in optimizer.param_groups:
        if plain and not group["momentum"]:
            continue
        if any(isinstance(p, FactoredTensor) and p.grad is not None for p in group["params"]):
            why = MOMENTUM if plain else f"it keeps numbers for each entry; {BY_SGD}"
            raise TypeError(f"torch.optim.{kind.__name__} cannot step a factored weight: {why}")


register_optimizer_step_pre_hook(refuse_step)
