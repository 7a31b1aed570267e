"""What a function does on a CPU, recorded once and compiled by TorchInductor.

It stands for a CUDA graph where there is no GPU. TorchInductor fuses the short operations between
the matrix products, and calls all of them without Python.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from softsphere._torch import by_inductor
from softsphere.graphs.drawing import Assertions, Drawing
from softsphere.graphs.recorder import Operation, Recorder, Unreadable, tensors_of
from softsphere.unread import recording, values_unread

__all__ = ["Graph"]

Result = TypeVar("Result")
Program = Callable[..., Any]

# Random numbers as PyTorch draws them without a compiler, where its version can; a program that
# calls no Python; no questions about sizes, which stay as they are; threads for long loops alone.
_OPTIONS = {
    "fallback_random": True,
    "cpp_wrapper": True,
    "size_asserts": False,
    "cpp.min_chunk_size": 8192,
}
# The programs that are kept, for graphs that differ in nothing but where their memory is.
_MOST = 32

_programs: OrderedDict[Any, Program] = OrderedDict()


class Graph:
    """What a function does on a CPU, as a program. It has the methods of `cuda.Graph`."""

    def __init__(self, device: torch.device) -> None:
        self._recorder = Recorder()
        self._inputs: list[Tensor] = []
        self._filled: list[Tensor] = []
        self._postponed: list[Operation] = []
        self._assertions: Assertions | None = None
        self._program: Program | None = None

    @staticmethod
    def warmed_up(function: Callable[[], Result], device: torch.device) -> Result:
        """Runs a function as it will be recorded, so that whatever is made once is made."""
        with values_unread():
            return function()

    def record(self, function: Callable[[], Result]) -> Result:
        """Records what a function does, and returns what it returns, which has no values yet.

        All memory stays as it was. Raises RuntimeError where the function reads a value, and
        ValueError where it asserts what does not hold.
        """
        random = torch.get_rng_state()
        try:
            with recording(), Unreadable(), self._recorder:
                return function()
        finally:
            torch.set_rng_state(random)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Compiles a program whose runs give these tensors new memory. It takes seconds.

        Raises RuntimeError if TorchInductor cannot compile it.
        """
        recorder, self._recorder = self._recorder, Recorder()
        drawing = Drawing(recorder)
        self._postponed = drawing.postponed
        later = [x for each in drawing.postponed for x in tensors_of((each.args, each.kwargs))]
        self._filled = [x for x in (*tensors, *later) if recorder.is_made(x)]
        graph = drawing.returning(self._filled)
        self._assertions = drawing.assertions()
        self._inputs = [x.detach() for x in drawing.inputs]
        self._program = _compiled(graph, self._inputs)
        for x in recorder.made():
            if x.is_floating_point():
                x.detach().fill_(torch.nan)  # so that what is not filled is not taken for a value

    def replay(self) -> None:
        """Runs the program. Raises ValueError, with nothing changed, where an assertion fails."""
        assert self._program is not None and self._assertions is not None
        with torch.no_grad():
            self._assertions.check(self._inputs)
            for x, value in zip(self._filled, self._program(*self._inputs), strict=True):
                x.data = value
            for operation in self._postponed:
                operation.call(*operation.args, **operation.kwargs)

    def handed_out(self, x: Tensor) -> Tensor:
        """A tensor for the caller, which later replays leave as it is."""
        is_new = any(x is each for each in self._filled)
        return x.detach() if is_new else x.clone()


def _compiled(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Program:
    """The program of a graph, which an equal graph may have brought already."""
    kinds = tuple((x.dtype, tuple(x.shape), x.stride()) for x in inputs)
    key = graph.code, kinds, torch.get_num_threads()
    if key not in _programs:
        try:
            _programs[key] = by_inductor(graph, inputs, _OPTIONS)
        except Exception as error:
            raise RuntimeError(
                f"the step cannot be compiled: {error}. TorchInductor needs a C++ compiler, and "
                "knows most operations; leave compile out to take steps without it"
            ) from error
        if len(_programs) > _MOST:
            _programs.popitem(last=False)
    _programs.move_to_end(key)
    return _programs[key]
