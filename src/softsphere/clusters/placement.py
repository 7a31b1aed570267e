"""Where the tensors of clusters are made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["on_cpu"]

Function = TypeVar("Function", bound=Callable[..., Any])


def on_cpu(function: Function) -> Function:
    """Lets a function make its tensors on the CPU whatever `torch.set_default_device` says."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return cast(Function, run)
