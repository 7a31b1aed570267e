"""Python's operators for factored tensors.

PyTorch's own operators turn a TypeError into NotImplemented. Python then says that the operands are
unsupported, or compares identities for == and !=. The operators here raise the error of the
operation behind them, which says what to use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["define_operators"]

_COMMUTING: dict[str, Callable[..., Any]] = {"add": torch.add, "mul": torch.mul}
_DIRECTED: dict[str, Callable[..., Any]] = {
    "sub": torch.sub,
    "truediv": torch.div,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "matmul": torch.matmul,
}
_COMPARING: dict[str, Callable[..., Any]] = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}
_IN_PLACE: dict[str, Callable[..., Any]] = {
    "add": Tensor.add_,
    "sub": Tensor.sub_,
    "mul": Tensor.mul_,
    "truediv": Tensor.div_,
    "floordiv": Tensor.floor_divide_,
    "mod": Tensor.remainder_,
    "pow": Tensor.pow_,
}


def _operator(function: Callable[..., Any]) -> Callable[[Tensor, Any], Any]:
    def apply(self: Tensor, other: Any) -> Any:
        return function(self, other) if _takes(function, other) else NotImplemented

    return apply


def _reflected(function: Callable[..., Any], commutes: bool) -> Callable[[Tensor, Any], Any]:
    def apply(self: Tensor, other: Any) -> Any:
        if not _takes(function, other):
            return NotImplemented
        if isinstance(other, Tensor):
            return function(other, self)
        if commutes:
            return function(self, other)
        return function(torch.tensor(other, dtype=self.dtype, device=self.device), self)

    return apply


def _takes(function: Callable[..., Any], other: Any) -> bool:
    """Whether an operand is a tensor, or a number where numbers have a meaning."""
    return isinstance(other, Tensor) or (
        isinstance(other, (float, int)) and function is not torch.matmul
    )


def define_operators(kind: type[Tensor]) -> None:
    """Gives a subclass of Tensor the operators of this module."""
    for name, function in {**_COMMUTING, **_DIRECTED, **_COMPARING}.items():
        setattr(kind, f"__{name}__", _operator(function))
    for name, function in {**_COMMUTING, **_DIRECTED}.items():
        setattr(kind, f"__r{name}__", _reflected(function, name in _COMMUTING))
    for name, function in _IN_PLACE.items():
        setattr(kind, f"__i{name}__", _operator(function))
