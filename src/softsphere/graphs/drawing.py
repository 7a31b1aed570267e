"""The graph of `torch.fx` of what was recorded."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from softsphere._torch import operation_name, written_tensors
from softsphere.graphs.recorder import Operation, Recorder, place, tensors_of

__all__ = ["Assertions", "Drawing"]

_aten = torch.ops.aten
_FUSED = "aten::_fused_"
_SUMS = {"aten::add", "aten::add_", "aten::sub", "aten::sub_"}


class Assertions(NamedTuple):
    """What has to be true before a program is run, as functions of its inputs."""

    conditions: fx.GraphModule
    messages: list[str]

    def check(self, inputs: Sequence[Tensor]) -> None:
        """Raises ValueError with the message of the first that does not hold."""
        for true, message in zip(self.conditions.forward(*inputs), self.messages, strict=True):
            if not bool(true):
                raise ValueError(message)


class Drawing:
    """Draws what was recorded as a graph, whose placeholders are the memory that was there before.

    inputs: that memory, a tensor for each placeholder
    postponed: the steps of PyTorch's fused optimizers, which TorchInductor does not know; they are
        no part of the graph, and can be taken after it
    """

    def __init__(self, recorder: Recorder) -> None:
        self._graph, self._recorder = fx.Graph(), recorder
        self._nodes: dict[Any, fx.Node] = {}
        # the first tensor in each memory that was made, which may have views
        self._first: dict[int, fx.Node] = {}
        self.inputs: list[Tensor] = []
        self._find_inputs()
        self._conditions: list[fx.Node] = []
        self._messages: list[str] = []
        self.postponed: list[Operation] = []
        for operation in recorder.operations:
            if operation.asserts is not None:
                self._conditions.append(self._node(operation.args[0]))
                self._messages.append(operation.asserts)
            elif operation_name(operation.call).startswith(_FUSED):
                self.postponed.append(operation)
            else:
                self._check_independent(operation)
                self._draw(operation)

    def assertions(self) -> Assertions:
        """Returns what was asserted, which is no part of the graph."""
        return Assertions(_alone(self._graph, self._conditions), self._messages)

    def returning(self, tensors: Sequence[Tensor]) -> fx.GraphModule:
        """Returns the graph as a function of the inputs whose values are those of these tensors."""
        self._graph.output(tuple(self._node(x) for x in tensors))
        return fx.GraphModule(torch.nn.Module(), self._graph)

    def _find_inputs(self) -> None:
        """Draws a placeholder for each memory that was there, and the tensors as parts of it."""
        found: dict[int, dict[Any, Tensor]] = {}
        for operation in self._recorder.operations:
            for x in tensors_of((operation.args, operation.kwargs)):
                if not self._recorder.is_made(x):
                    found.setdefault(place(x), {}).setdefault(_where(x), x)
        wholes: list[tuple[fx.Node, dict[Any, Tensor]]] = []
        for parts in found.values():
            if len(parts) == 1 or not all(x.numel() for x in parts.values()):
                self._nodes |= {where: self._input(x) for where, x in parts.items()}
            else:
                first = next(iter(parts.values()))
                whole = first.new_empty(0).set_(first.untyped_storage())
                wholes.append((self._input(whole), parts))
        for node, parts in wholes:  # behind all placeholders
            self._nodes |= {where: self._part(node, x) for where, x in parts.items()}

    def _input(self, x: Tensor) -> fx.Node:
        self.inputs.append(x)
        return self._graph.placeholder(f"input_{len(self.inputs)}")

    def _draw(self, operation: Operation) -> None:
        args, kwargs = map_aggregate(
            (operation.args, operation.kwargs),
            lambda x: self._node(x) if isinstance(x, Tensor) else x,
        )
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
                    f"in {operation_name(operation.call)}"
                )

    def _take(self, x: Tensor, node: fx.Node) -> None:
        self._nodes[_where(x)] = node
        self._first.setdefault(place(x), node)

    def _node(self, x: Tensor) -> fx.Node:
        """The node of a tensor, or of a view that was made without an operation."""
        if _where(x) not in self._nodes:
            self._nodes[_where(x)] = self._part(self._first[place(x)], x)
        return self._nodes[_where(x)]

    def _part(self, whole: fx.Node, x: Tensor) -> fx.Node:
        args = (whole, x.shape, x.stride(), x.storage_offset())
        return self._graph.call_function(_aten.as_strided.default, args)


def _depend(one: Operation, two: Operation) -> bool:
    """Whether the second operation reads or writes what the first one writes."""
    written = written_tensors(one.call, one.args, one.kwargs)
    touched = tensors_of((two.args, two.kwargs))
    return not {place(x) for x in written}.isdisjoint(map(place, touched))


def _where(x: Tensor) -> Any:
    """Where each number of a tensor is in memory, and what kind it is."""
    return x.data_ptr(), x.dtype, tuple(x.shape), x.stride()


def _alone(graph: fx.Graph, conditions: list[fx.Node]) -> fx.GraphModule:
    """The part of a graph that some nodes need, as a function that returns their values."""
    nodes: dict[fx.Node, fx.Node] = {}
    part = fx.Graph()
    part.graph_copy(graph, nodes)
    part.output(tuple(nodes[node] for node in conditions))
    for node in reversed(part.nodes):
        if node.op == "call_function" and not node.users:
            part.erase_node(node)
    return fx.GraphModule(torch.nn.Module(), part)
