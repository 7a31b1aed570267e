"""The graph of `torch.fx` of what was recorded."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from softsphere._torch import operation_name
from softsphere.graphs.recorder import Operation, Recorder
from softsphere.graphs.tensors import each, place, tensors_of, where

__all__ = ["Drawing"]

_aten = torch.ops.aten
_FUSED = "aten::_fused_"
_SUMS = {"aten::add", "aten::add_", "aten::sub", "aten::sub_"}


class Drawing:
    """Draws operations as a graph, whose placeholders are the memory that was there before.

    operations: some of those that were recorded
    given: tensors that were made and are placeholders as well
    inputs: that memory, a tensor for each placeholder
    postponed: the steps of PyTorch's fused optimizers, which TorchInductor does not know; they are
        no part of the graph, and can be taken after it
    """

    def __init__(
        self, recorder: Recorder, operations: Sequence[Operation], given: Sequence[Tensor] = ()
    ) -> None:
        self._graph, self._recorder, self._operations = fx.Graph(), recorder, operations
        self._nodes: dict[Any, fx.Node] = {}
        # the first tensor in each memory that was made, which may have views
        self._first: dict[int, fx.Node] = {}
        self.inputs: list[Tensor] = []
        self._find_inputs({where(x) for x in given})
        self.postponed: list[Operation] = []
        for operation in operations:
            if operation_name(operation.call).startswith(_FUSED):
                self.postponed.append(operation)
            else:
                self._check_independent(operation)
                self._draw(operation)

    def returning(self, tensors: Sequence[Tensor]) -> fx.GraphModule:
        """Returns the graph as a function of the inputs whose values are those of these tensors."""
        self._graph.output(tuple(self._node(x) for x in tensors))
        return fx.GraphModule(torch.nn.Module(), self._graph)

    def _find_inputs(self, given: set[Any]) -> None:
        """Draws a placeholder for each memory that was there, and the tensors as parts of it."""
        found: dict[int, dict[Any, Tensor]] = {}
        viewed: set[Any] = set()
        for operation in self._operations:
            for x in operation.given:
                is_input = where(x) in given or not self._recorder.is_made(x)
                if is_input and where(x) not in viewed:
                    # an empty tensor shares its memory with no other
                    shared = place(x) if x.numel() else id(x)
                    found.setdefault(shared, {}).setdefault(where(x), x)
            viewed |= {where(x) for x in tensors_of(operation.result)}
        wholes: list[tuple[fx.Node, dict[Any, Tensor]]] = []
        for parts in found.values():
            if len(parts) == 1:
                self._nodes |= {key: self._input(x) for key, x in parts.items()}
            else:
                self._check_unwritten(parts.values())
                first = next(iter(parts.values()))
                whole = first.new_empty(0).set_(first.untyped_storage())
                wholes.append((self._input(whole), parts))
        for node, parts in wholes:  # behind all placeholders
            self._nodes |= {key: self._part(node, x) for key, x in parts.items()}

    def _input(self, x: Tensor) -> fx.Node:
        self.inputs.append(x)
        node = self._graph.placeholder(f"input_{len(self.inputs)}")
        node.meta["dtype"] = x.dtype
        return node

    def _draw(self, operation: Operation) -> None:
        args, kwargs = each((operation.args, operation.kwargs), self._node)
        args, kwargs = self._without_alpha(operation.call, args, dict(kwargs))
        node = self._graph.call_function(operation.call, args, kwargs)
        result = operation.result
        if isinstance(result, Tensor):
            self._take(result, node)
        elif isinstance(result, tuple | list):
            for i, x in enumerate(result):
                if isinstance(x, Tensor):
                    self._take(x, self._graph.call_function(operator.getitem, (node, i)))

    def _without_alpha(self, call: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The same arguments of a sum, with α taken into the second one.

        TorchInductor of torch 2.13 loses α where it makes a sum with a product an `addmm`.
        """
        if operation_name(call) not in _SUMS or "alpha" not in kwargs:
            return args, kwargs
        alpha = kwargs.pop("alpha")
        scaled = self._graph.call_function(_aten.mul.Scalar, (args[1], alpha))
        return (args[0], scaled, *args[2:]), kwargs

    def _check_independent(self, operation: Operation) -> None:
        """Raises RuntimeError if an operation has to come after one that was postponed."""
        for earlier in self.postponed:
            if _depend(earlier, operation) or _depend(operation, earlier):
                raise RuntimeError(
                    "train must step the optimizers last: it steps parameters by "
                    f"{operation_name(earlier.call)}, and uses them or their gradients afterwards, "
                    f"in {operation_name(operation.call)}; do so before, or between the steps"
                )

    def _take(self, x: Tensor, node: fx.Node) -> None:
        self._nodes[where(x)] = node
        node.meta["dtype"] = x.dtype
        self._first.setdefault(place(x), node)

    def _node(self, x: Tensor) -> fx.Node:
        """The node of a tensor, or of a view that was made without an operation."""
        if where(x) not in self._nodes:
            self._nodes[where(x)] = self._part(self._first.get(place(x)), x)
        return self._nodes[where(x)]

    def _part(self, whole: fx.Node | None, x: Tensor) -> fx.Node:
        """Draws a tensor as a part of the first one in its memory.

        Raises RuntimeError where no operation says how it has come to its memory.
        """
        if whole is None or whole.meta["dtype"] != x.dtype or x.is_conj() or x.is_neg():
            raise RuntimeError(
                f"a tensor of shape {tuple(x.shape)} and {x.dtype} has the memory of another one, "
                "which no operation of train has given to it, as where `.data` is set or one "
                "array of NumPy has two dtypes; leave compile out"
            )
        args = (whole, x.shape, x.stride(), x.storage_offset())
        return self._graph.call_function(_aten.as_strided.default, args)

    def _check_unwritten(self, parts: Iterable[Tensor]) -> None:
        """Raises RuntimeError if memory is written of which there are several parts.

        TorchInductor of torch 2.13 may lose such a write where the memory is read in another order.
        """
        written = {place(x) for operation in self._operations for x in operation.written}
        for x in parts:
            if place(x) in written:
                raise RuntimeError(
                    f"train writes memory of which it uses several tensors, one of shape "
                    f"{tuple(x.shape)}, that were there before; keep one of them, and take its "
                    "parts in train, or leave compile out"
                )


def _depend(one: Operation, two: Operation) -> bool:
    """Whether the second operation reads or writes what the first one writes."""
    return not {place(x) for x in one.written}.isdisjoint(map(place, two.given))
