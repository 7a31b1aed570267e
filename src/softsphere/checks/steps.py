"""Checks of what a captured training step is made of and called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_step", "inputs_like"]


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
    for i, x in enumerate(examples):
        if not isinstance(x, Tensor):
            raise TypeError(f"example {i} must be a tensor like the inputs, got {_kind(x)}")
    return given


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


def _kind(x: Any) -> str:
    return type(x).__name__


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype} on {x.device}"
