"""Records what a function does with tensors on a CPU, and changes nothing meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from softsphere._torch import (
    TorchDispatchMode,
    is_plain,
    number_of_results,
    operation_name,
    returns_what_it_writes,
    written_tensors,
)

__all__ = ["Operation", "Recorder", "Unreadable", "place", "tensors_of"]

# What reads the memory of a tensor without an operation.
_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
# Operations that write into what they are given, and do not say so.
_SILENT = {"aten::native_batch_norm"}
# How operations are marked whose result, or its shape, depends on values that Python would see.
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Operations that keep for a backward pass what depends on whether gradients are wanted, which in a
# program they are not.
_KEEPING = {"aten::mkldnn_rnn_layer"}
_ASSERTIONS = {"aten::_assert_async"}


class Operation(NamedTuple):
    """A call of an operation of torch.ops, and what it returned.

    asserts: the message of an assertion, whose condition is the first argument; None for others
    """

    call: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    asserts: str | None = None


class Unreadable(TorchFunctionMode):
    """Refuses to let Python read the memory of a tensor, which no operation would show."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READERS:
            raise RuntimeError(_told(func.__name__))
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Records operations on plain tensors. Memory that was there before stays as it was.

    operations: what was recorded, with every tensor, so that no two of them share memory by chance
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if not all(is_plain(x) for x in given):
            return NotImplemented  # their own handler is called, whose operations come here again
        name = operation_name(func)
        if name in _ASSERTIONS:
            message = args[1] if len(args) > 1 else "an assertion of train does not hold"
            if not bool(args[0]):  # or what follows would fail with words of its own
                raise ValueError(message)
            self.operations.append(Operation(func, args, kwargs, None, message))
            return None
        if name == "aten::lift_fresh":
            # numbers of Python are a new tensor in each run, which may change it
            func = torch.ops.aten.clone.default
        _check_reads_nothing(func, name, args)
        if name in _KEEPING:
            raise RuntimeError(
                f"train must not call {name.split('::')[-1]}, as an LSTM on a CPU does, whose "
                "backward pass a program cannot take; leave compile out"
            )
        result = self._result(func, args, kwargs, given if name in _SILENT else None)
        self.operations.append(Operation(func, args, kwargs, result))
        self._made |= {place(x) for x in tensors_of(result)} - {place(x) for x in given}
        return result

    def _result(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, written: list[Tensor] | None
    ) -> Any:
        """What an operation returns. Only where it writes new memory is it also done."""
        silent = written is not None
        written = written_tensors(func, args, kwargs) if written is None else written
        if all(self.is_made(x) for x in written):
            return func(*args, **kwargs)
        if not silent and returns_what_it_writes(func):
            return _as_returned(func, written)
        old = {id(x) for x in written}
        copied = _each((args, kwargs), lambda x: x.clone() if id(x) in old else x)
        return func(*copied[0], **copied[1])

    def is_made(self, x: Tensor) -> bool:
        """Whether the memory of a tensor was made by what was recorded; that of none was not."""
        return x.numel() > 0 and place(x) in self._made

    def made(self) -> Iterator[Tensor]:
        """The tensors in memory that was made."""
        for operation in self.operations:
            yield from (x for x in tensors_of(operation.result) if self.is_made(x))


def place(x: Tensor) -> int:
    """Where the storage of a tensor is in memory."""
    return x.untyped_storage().data_ptr()


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    found: list[Tensor] = []
    _each(x, found.append)
    return found


def _each(x: Any, change: Callable[[Tensor], Any]) -> Any:
    """Changes each tensor in nested tuples, lists and dictionaries."""
    return map_aggregate(x, lambda y: change(y) if isinstance(y, Tensor) else y)


def _as_returned(func: Any, written: list[Tensor]) -> Any:
    """What an operation returns that returns what it has written, or nothing."""
    count = number_of_results(func)
    if count == 0:
        return None
    return written[0] if count == 1 else tuple(written[:count])


def _check_reads_nothing(func: Any, name: str, args: tuple[Any, ...]) -> None:
    """Raises RuntimeError for an operation that reads a value, or whose shapes depend on one."""
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        reads = any(x.dtype in (torch.bool, torch.uint8) for x in tensors_of(args[1]))
    else:
        reads = not _READS.isdisjoint(func.tags)
    if reads:
        raise RuntimeError(_told(name.split("::")[-1]))


def _told(name: str) -> str:
    return (
        f"train must not read a value, as {name} does, since a compiled step goes on in the same "
        "way whatever the values are; leave compile out, or do without"
    )
