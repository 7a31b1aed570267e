"""Records what a function does with tensors on a CPU, and leaves all as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softsphere._torch import (
    TorchDispatchMode,
    assert_later,
    is_plain,
    number_of_results,
    operation_name,
    returns_what_it_writes,
    written_tensors,
)
from softsphere.graphs.bounds import bounds
from softsphere.graphs.reading import check_reads_nothing, is_called_by_package, where_called
from softsphere.graphs.tensors import each, place, tensors_of, where

__all__ = ["Operation", "Recorder"]

_aten = torch.ops.aten
# Operations that write into what they are given, and do not say so.
_SILENT = {"native_batch_norm"}
# What is recorded in their place: a new tensor each, where they look at memory in another way, or
# keep the numbers of Python, which a run may change.
_REPLACED = {
    "lift_fresh": _aten.clone.default,
    "_conj": _aten._conj_physical.default,
    "_neg_view": _aten.neg.default,
}
# Operations that keep for a backward pass what depends on whether gradients are wanted, which in a
# program they are not.
_KEEPING = {"mkldnn_rnn_layer"}
_ASSERTION = "_assert_async"


class Operation(NamedTuple):
    """A call of an operation of torch.ops, and what it returned.

    asserts: the message of an assertion, whose condition is the first argument; None for others
    """

    call: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    asserts: str | None = None

    @property
    def given(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return tensors_of((self.args, self.kwargs))

    @property
    def written(self) -> list[Tensor]:
        """Those of them that it writes, by its schema."""
        return written_tensors(self.call, self.args, self.kwargs)


class Recorder(TorchDispatchMode):
    """Records operations on plain tensors. Memory that was there before stays as it was.

    Integers there are changed meanwhile, since what is an index must be one, and put back at the
    end. Other memory is never changed, so that what depends on it has any values.

    operations: what was recorded, with an alias of each tensor, so that no two of them share memory
        by chance
    constants: where memory is that holds numbers of Python
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.constants: set[int] = set()
        self._made: set[int] = set()
        self._aliases: dict[Any, Tensor] = {}
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        # the places of what was made from memory that was there before
        self._dependent: set[int] = set()
        # the places of copies that stand for views, through which nothing can be written
        self._copies: set[int] = set()
        # the bounds that were asserted, by the place of the indices
        self._asserted: dict[int, set[Any]] = {}
        self._random = torch.get_rng_state()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if not all(is_plain(x) for x in given):
            return NotImplemented  # their own handler is called, whose operations come here again
        func, args = _without_mask(func, args, kwargs)
        name = _name(func)
        _check_possible(func, name, args, kwargs)
        self._check_random()
        if name == _ASSERTION:
            return self._assert(func, *args)
        if not is_called_by_package():
            self._assert_bounds(name, args)
        if name == "lift_fresh":
            # memory of NumPy, which cannot be resized, may have been computed from other values
            self.constants |= {place(x) for x in given if x.untyped_storage().resizable()}
        func = _REPLACED.get(name, func)
        kept = each((args, kwargs), self._kept)
        result = self._result(func, name, args, kwargs)
        _check_dense(name, [*given, *tensors_of(result)])
        if name in ("_conj", "_neg_view"):
            self._copies.add(place(result))
        self._random = torch.get_rng_state()
        self._note(given, written_tensors(func, args, kwargs), tensors_of(result))
        self.operations.append(Operation(func, kept[0], dict(kept[1]), each(result, self._kept)))
        return result

    def is_made(self, x: Tensor) -> bool:
        """Whether the memory of a tensor was made by what was recorded; that of none was not."""
        return x.numel() > 0 and place(x) in self._made

    def made(self) -> Iterator[Tensor]:
        """The tensors in memory that was made."""
        for operation in self.operations:
            yield from (x for x in tensors_of(operation.result) if self.is_made(x))

    def restore(self) -> None:
        """Puts back the integers that were changed."""
        for memory, before in self._saved.values():
            memory.copy_(before)
        self._saved.clear()

    def _assert(self, func: Any, true: Tensor, message: str = "an assertion fails") -> None:
        if not bool(true):  # or what follows would fail with words of its own
            raise ValueError(message)
        self.operations.append(Operation(func, (self._kept(true), message), {}, None, message))

    def _check_random(self) -> None:
        """Raises RuntimeError if random numbers were set to come again."""
        if not torch.equal(self._random, torch.get_rng_state()):
            raise RuntimeError(
                "train must not set the state of the random numbers, as torch.manual_seed does and "
                f"torch.utils.checkpoint where there is dropout{where_called()}, since a program "
                "draws each number anew; leave compile out, or do without"
            )

    def _result(self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        """What an operation returns. Only where it writes new memory or integers is it done."""
        silent = name in _SILENT
        written = tensors_of((args, kwargs)) if silent else written_tensors(func, args, kwargs)
        if any(place(x) in self._copies for x in written):
            raise RuntimeError(
                f"train must not write through a conjugate, as {name} does{where_called()}; write "
                "the tensor itself, or leave compile out"
            )
        # what has no numbers yet is given some, as by out=
        there = [x for x in written if x.numel() and not self.is_made(x)]
        if not any(x.is_floating_point() or x.is_complex() for x in there):
            for x in there:
                self._save(x)
            return func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise RuntimeError(
                f"train must not change the shape of a tensor in place, as {name} "
                f"does{where_called()}; leave compile out, or do without"
            )
        if not silent and returns_what_it_writes(func):
            return _as_returned(func, written)
        old = {id(x) for x in written}
        copied = each((args, kwargs), lambda x: x.clone() if id(x) in old else x)
        return func(*copied[0], **copied[1])

    def _save(self, x: Tensor) -> None:
        """Keeps what memory holds, to be put back at the end."""
        if place(x) not in self._saved:
            memory = x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            self._saved[place(x)] = memory, memory.clone()

    def _kept(self, x: Tensor) -> Tensor:
        """An alias of a tensor, which has its shape and its memory, whatever is done with x later.

        Of one that was there before there is one alias, so that it can be told whether anybody else
        holds it.
        """
        if self.is_made(x):
            return x.detach()
        return self._aliases.setdefault(where(x), x.detach())

    def _assert_bounds(self, name: str, args: tuple[Any, ...]) -> None:
        """Asserts that the indices of an operation are within bounds, unless it was done before.

        Those that come from no memory that was there before, as from arange, are what they are.
        """
        for bound in bounds(name, args):
            at, key = place(bound.indices), (where(bound.indices), bound.least, bound.end)
            from_there = not self.is_made(bound.indices) or at in self._dependent
            if from_there and key not in self._asserted.get(at, ()):
                with self:
                    assert_later(bound.hold(), bound.message)
                self._asserted.setdefault(at, set()).add(key)

    def _note(self, given: list[Tensor], written: list[Tensor], returned: list[Tensor]) -> None:
        """Notes what was made, from what, and that what was written may be out of bounds now."""
        there = {place(x) for x in given}
        self._made |= {place(x) for x in returned} - there
        if any(at in self._dependent or at not in self._made | self.constants for at in there):
            changed = {place(x) for x in (*written, *returned)}
            self._dependent |= changed & self._made
        for x in written:
            self._asserted.pop(place(x), None)


def _as_returned(func: Any, written: list[Tensor]) -> Any:
    """What an operation returns that returns what it has written, or nothing."""
    count = number_of_results(func)
    if count == 0:
        return None
    return written[0] if count == 1 else tuple(written[:count])


def _name(func: Any) -> str:
    """The name of an operation without its namespace."""
    return operation_name(func).split("::")[-1]


def _without_mask(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """x[mask] = number as masked_fill_, which reads no value; anything else as it is."""
    if _name(func) != "index_put_" or kwargs or len(args[1]) != 1 or any(args[3:]):
        return func, args
    x, (mask,), value = args[:3]
    if mask is None or mask.dtype != torch.bool or mask.dim() != x.dim() or value.dim():
        return func, args
    return _aten.masked_fill_.Tensor, (x, mask, value)


def _check_possible(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError for an operation that a program cannot take."""
    if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
        raise RuntimeError(
            f"train must not draw from a generator of its own, as {name} does{where_called()}; "
            "draw from PyTorch's own, or before the step and give it as an input"
        )
    check_reads_nothing(func, name, args)
    if name in _KEEPING:
        raise RuntimeError(
            f"train must not call {name}, as an LSTM on a CPU does{where_called()}, whose backward "
            "pass a program cannot take; leave compile out"
        )


def _check_dense(name: str, tensors: list[Tensor]) -> None:
    """Raises RuntimeError for sparse tensors, whose numbers are at no place."""
    if any(x.layout != torch.strided for x in tensors):
        raise RuntimeError(
            f"train must not use sparse tensors, as {name} does{where_called()}; leave compile "
            "out, or use dense ones"
        )
