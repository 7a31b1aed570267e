"""What a function does on a CPU, recorded once and compiled by TorchInductor.

It stands for a CUDA graph where there is no GPU. TorchInductor fuses the short operations between
the matrix products, and calls all of them without Python.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from softsphere._torch import by_inductor, users_of_memory
from softsphere.graphs.assertions import Assertions
from softsphere.graphs.drawing import Drawing
from softsphere.graphs.reading import Unreadable
from softsphere.graphs.recorder import Operation, Recorder
from softsphere.graphs.tensors import place, tensors_of, where
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
        self._recorder: Recorder | None = None
        self._inputs: list[Tensor] = []
        # those of the inputs that others look after, and how many tensors of this graph share them
        self._watched: list[tuple[Tensor, int]] = []
        # which of the inputs is what was drawn for the run
        self._drawn_at: list[int | None] = []
        self._filled: list[Tensor] = []
        # whether each of these has memory of its own
        self._alone: dict[int, bool] = {}
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
        recorder = Recorder()
        try:
            with recording(), Unreadable(), recorder:
                result = function()
        finally:
            recorder.restore()
            torch.set_rng_state(random)
        self._recorder = recorder
        return result

    def fill(self, tensors: Sequence[Tensor], known: Collection[int]) -> None:
        """Compiles a program whose runs give these tensors new memory. It takes seconds.

        known: the addresses of memory that the caller looks after

        Raises RuntimeError if the record has what no program can take.
        """
        recorder, self._recorder = self._recorder, None
        assert recorder is not None
        try:
            self._assertions = Assertions(recorder)
            early = {id(x) for x in self._assertions.drawing}
            later = [x for x in recorder.operations if x.asserts is None and id(x) not in early]
            drawn = self._assertions.drawn
            drawing = Drawing(recorder, later, drawn)
            self._postponed = drawing.postponed
            needed = [x for each in drawing.postponed for x in each.given]
            self._filled = [x for x in (*tensors, *needed) if recorder.is_made(x)]
            graph = drawing.returning(self._filled)
            self._inputs = [x.detach() for x in drawing.inputs]
            places = [where(x) for x in self._inputs]
            self._drawn_at = [places.index(where(x)) if where(x) in places else None for x in drawn]
            made = [x.detach() for x in recorder.made()]
            known = recorder.constants.union(known, (x.data_ptr() for x in drawn))
            del recorder, drawing, later  # and with them the other tensors that they have held
            self._watch(known)
            self._program = _compiled(graph, self._inputs)
        except RuntimeError:
            raise
        except Exception as error:  # fx and TorchInductor raise all kinds
            raise RuntimeError(_cannot(error)) from error
        for x in made:
            if x.is_floating_point():
                x.fill_(torch.nan)  # so that what is not filled is not taken for a value

    def _watch(self, known: Collection[int]) -> None:
        """Notes which of the inputs others look after.

        Raises RuntimeError if nobody does: it was made without an operation, by a thread or by
        NumPy, or it was put aside by the step before, where a program would not find the next one.
        """
        assert self._assertions is not None
        of_this = self._inputs, self._assertions.inputs, self._assertions.drawn
        postponed = [each.given for each in self._postponed]
        # each tensor once, though several operations may have it
        own = {id(x): x for x in tensors_of((*of_this, postponed))}.values()
        users = Counter(map(place, own))
        for x in self._inputs:
            if not x.numel() or place(x) in known or x.data_ptr() in known:
                continue
            self._watched.append((x, users[place(x)]))
            if users_of_memory(x) <= users[place(x)]:
                raise RuntimeError(
                    f"train uses a tensor of shape {tuple(x.shape)} and {x.dtype} that it does not "
                    "keep, and that no operation of it has made: a result of the step before, "
                    "which has to be kept by copy_ into a tensor that stays the same, the next "
                    "batch of a DataLoader, or what NumPy or another thread has computed. Give it "
                    "to the step as an input, or leave compile out"
                )

    def is_current(self) -> bool:
        """Whether all memory that the program reads is still that which the function would read.

        It is not where a tensor has been put in the place of another one.
        """
        return all(users_of_memory(x) > own for x, own in self._watched)

    def replay(self) -> None:
        """Runs the program.

        Raises ValueError, with nothing changed, where an assertion fails, and RuntimeError where
        the program does.
        """
        assert self._program is not None and self._assertions is not None
        with torch.no_grad():
            inputs = list(self._inputs)
            for at, x in zip(self._drawn_at, self._assertions.check(), strict=True):
                if at is not None:
                    inputs[at] = x
            try:
                values = self._program(*inputs)
            except Exception as error:
                raise RuntimeError(
                    f"a compiled step failed on its way: {error}. Some of what it writes may have "
                    "changed; load the last state that you saved"
                ) from error
            for x, value in zip(self._filled, values, strict=True):
                x.data = value
            for operation in self._postponed:
                operation.call(*operation.args, **operation.kwargs)

    def handed_out(self, x: Tensor) -> Tensor:
        """A tensor for the caller, which later replays and other outputs leave as it is."""
        if not self._alone:
            places = [place(each) for each in self._filled]
            pairs = zip(self._filled, places, strict=True)
            self._alone = {id(each): places.count(at) == 1 for each, at in pairs}
        return x.detach() if self._alone.get(id(x)) else x.clone()


def _compiled(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Program:
    """The program of a graph, which an equal graph may have brought already."""
    kinds = tuple((x.dtype, tuple(x.shape), x.stride()) for x in inputs)
    key = graph.code, kinds, torch.get_num_threads()
    if key not in _programs:
        try:
            _programs[key] = by_inductor(graph, inputs, _OPTIONS)
        except Exception as error:
            raise RuntimeError(_cannot(error)) from error
        if len(_programs) > _MOST:
            _programs.popitem(last=False)
    _programs.move_to_end(key)
    return _programs[key]


def _cannot(error: Exception) -> str:
    words = str(error)
    compiler = ", which needs a C++ compiler" if "compiler" in words.lower() else ""
    return (
        f"TorchInductor cannot compile the step{compiler}: {words}; leave compile out to take "
        "steps without it"
    )
