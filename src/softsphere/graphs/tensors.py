"""Tensors in nested arguments, and where they are in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx.node import map_aggregate

__all__ = ["each", "place", "tensors_of", "where"]


def place(x: Tensor) -> int:
    """Where the storage of a tensor is in memory."""
    return x.untyped_storage().data_ptr()


def where(x: Tensor) -> Any:
    """Where each number of a tensor is in memory, and what kind it is."""
    kind = x.dtype, x.is_conj(), x.is_neg()
    return x.data_ptr(), kind, tuple(x.shape), x.stride()


def each(x: Any, change: Callable[[Tensor], Any]) -> Any:
    """Changes each tensor in nested tuples, lists and dictionaries."""
    return map_aggregate(x, lambda y: change(y) if isinstance(y, Tensor) else y)


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    found: list[Tensor] = []
    each(x, found.append)
    return found
