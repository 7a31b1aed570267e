"""What reads the values of tensors, which a record cannot hold."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from softsphere.graphs.tensors import tensors_of

__all__ = ["Unreadable", "check_reads_nothing", "is_called_by_package", "where_called"]

# What reads the memory of a tensor without an operation that a dispatch mode would see.
_READERS = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__),
    *(Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__bool__, Tensor.__complex__),
    *(Tensor.__format__, Tensor.__reduce_ex__),
}
# What reads the tensors in a list of numbers.
_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_SPLITS = {torch.tensor_split, Tensor.tensor_split}
# How operations are marked whose result, or its shape, depends on values that Python would see.
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXED = {"index", "index_put", "index_put_"}
_NAMES = {"_local_scalar_dense": "item()"}
_GRAPHS, _PACKAGE, _TORCH = (
    os.path.dirname(sys.modules[name].__file__ or "") + os.sep
    for name in (__name__, "softsphere", "torch")
)


class Unreadable(TorchFunctionMode):
    """Refuses to let Python read the memory of a tensor, which no operation would show."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READERS or _reads_numbers(func, args, kwargs or {}):
            raise _reads_a_value(func.__name__)
        return func(*args, **(kwargs or {}))


def _reads_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function reads tensors that it is given as numbers."""
    if func in _SPLITS:
        return len(tensors_of((args, kwargs))) > 1
    if func not in _MAKERS:
        return False
    data = [*args, *kwargs.values()][1 if func is Tensor.new_tensor else 0 :]
    return any(isinstance(x, list | tuple) and tensors_of(x) for x in data)


def check_reads_nothing(func: Any, name: str, args: tuple[Any, ...]) -> None:
    """Raises RuntimeError for an operation that reads a value, or whose shapes depend on one.

    name: that of the operation, without its namespace
    """
    if name in _INDEXED:
        reads = any(x.dtype in (torch.bool, torch.uint8) for x in tensors_of(args[1]))
    else:
        reads = not _READS.isdisjoint(func.tags)
    if reads:
        raise _reads_a_value(name)


def _reads_a_value(name: str) -> RuntimeError:
    """Makes the error for what reads a value."""
    return RuntimeError(
        f"train must not read a value, as {_NAMES.get(name, name)} does{where_called()}, since a "
        "compiled step goes on in the same way whatever the values are; leave compile out, or do "
        "without, as by torch.where"
    )


def where_called() -> str:
    """Says which line of the caller's own code runs now; nothing in a thread of PyTorch."""
    frame = _frame_outside(_TORCH, _PACKAGE)
    if frame is None:
        return ""
    return f" in line {frame.f_lineno} of {os.path.basename(frame.f_code.co_filename)}"


def is_called_by_package() -> bool:
    """Whether the operation that runs now is one of this package, which checks what it is given."""
    frame = _frame_outside(_TORCH, _GRAPHS)
    return frame is not None and frame.f_code.co_filename.startswith(_PACKAGE)


def _frame_outside(*folders: str) -> FrameType | None:
    """The innermost frame of code that is in none of these folders."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(folders):
        frame = frame.f_back
    return frame
