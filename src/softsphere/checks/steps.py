"""Checks of what a captured training step is made of and called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_options", "check_step", "inputs_like"]


def check_step(train: Any, optimizers: Any, examples: Sequence[Any]) -> list[torch.optim.Optimizer]:
    """Returns the optimizers as a list. Raises TypeError for what is none of a training step."""
    if isinstance(train, torch.optim.Optimizer) and callable(optimizers):
        raise TypeError("train comes first and optimizer second, got them the other way round")
    if not callable(train):
        raise TypeError(f"train must be a function that does a step, got {_kind(train)}")
    given = list(optimizers) if isinstance(optimizers, list | tuple) else [optimizers]
    if not given:
        raise TypeError("optimizer must be an optimizer or several, got none")
    for x in given:
        if not isinstance(x, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be an optimizer, or a list or tuple of several, got {_kind(x)}"
            )
        if "capturable" not in x.defaults and not _is_sgd(x):
            raise TypeError(
                "optimizer must be a softsphere.optim.FactoredSGD, which can step a whole model, "
                "torch.optim.SGD with fused=True, or one of PyTorch's with the option capturable, "
                f"got {_kind(x)}"
            )
    for i, x in enumerate(examples):
        if not isinstance(x, Tensor):
            raise TypeError(f"example {i} must be a tensor like the inputs, got {_kind(x)}")
    return given


def check_options(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    is_ours: bool,
    on_cpu: bool,
    is_captured: bool,
) -> None:
    """Raises TypeError if a group of an optimizer cannot be stepped, or captured, where it is.

    is_ours: whether it is a FactoredSGD
    """
    # PyTorch's other optimizers read numbers of a CPU unless they are fused
    options = {"fused": _is_sgd(optimizer) or (on_cpu and not is_ours)}
    options["capturable"] = not _is_sgd(optimizer)
    missing = [name for name, is_needed in options.items() if is_needed and not group.get(name)]
    if is_captured and missing:
        needed = " and ".join(f"{name}=True" for name, is_needed in options.items() if is_needed)
        raise TypeError(
            f"optimizer must be made with {needed}, and so must all of its groups, got an "
            f"{_kind(optimizer)} without {' and '.join(missing)}"
        )
    if on_cpu and group.get("capturable") and not (group.get("fused") or is_ours):
        raise TypeError(
            f"optimizer is an {_kind(optimizer)} with capturable=True, which PyTorch does not step "
            "on a CPU unless it is fused; make it with capturable=False, or with fused=True as well"
        )


def inputs_like(examples: Sequence[Tensor], given: Sequence[Any]) -> None:
    """Raises TypeError or ValueError if inputs are not like the examples."""
    if len(given) != len(examples):
        raise ValueError(
            f"a step must be given as many inputs as it was made with examples, {len(examples)}, "
            f"got {len(given)}"
        )
    for i, (x, example) in enumerate(zip(given, examples, strict=True)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"input {i} must be {_described(example)}, as the example, got {_kind(x)}"
            )
        if (x.shape, x.dtype, x.device) != (example.shape, example.dtype, example.device):
            raise ValueError(
                f"input {i} must be {_described(example)}, as the example, got {_described(x)}"
                f"{_smaller(x, example)}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"input {i} requires a gradient, and none goes through the step; compute it in "
                "train, or give x.detach() and have train return the gradient of a leaf"
            )


def _smaller(x: Tensor, example: Tensor) -> str:
    """What to do with a batch that is only smaller."""
    alike = (x.dtype, x.device, x.shape[1:]) == (example.dtype, example.device, example.shape[1:])
    if not (alike and x.dim() and len(x) < len(example)):
        return ""
    return (
        "; pad a smaller batch with rows of zeros, whose target is the layer's ignore_index, or "
        "make a step for its size"
    )


def _is_sgd(optimizer: Any) -> bool:
    """Whether it is PyTorch's SGD, which reads nothing from the device if it is fused."""
    return isinstance(optimizer, torch.optim.SGD)


def _kind(x: Any) -> str:
    return type(x).__name__


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype} on {x.device}"
