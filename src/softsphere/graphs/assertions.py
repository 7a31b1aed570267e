"""What has to be true before a program is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import written_tensors
from softsphere.graphs.drawing import Drawing
from softsphere.graphs.recorder import Operation, Recorder
from softsphere.graphs.tensors import place, tensors_of

__all__ = ["Assertions"]


class Assertions:
    """What a record asserts, to be looked at before its program is run.

    inputs: the memory that it depends on

    Raises RuntimeError where it depends on random numbers, which the program would draw anew.
    """

    def __init__(self, recorder: Recorder) -> None:
        asserted = [each for each in recorder.operations if each.asserts is not None]
        self._messages = [each.asserts for each in asserted]
        conditions = [each.args[0] for each in asserted]
        needed = list(_needed(recorder.operations, conditions))[::-1]
        drawing = Drawing(recorder, needed)
        self._conditions = drawing.returning(conditions)
        # what is written on the way to a condition is changed in the program, and not here
        written = {place(x) for each in needed for x in _written(each)}
        self.inputs = [x.detach() for x in drawing.inputs]
        self._written = [place(x) in written for x in drawing.inputs]

    def check(self) -> None:
        """Raises ValueError with the message of the first that does not hold."""
        both = zip(self.inputs, self._written, strict=True)
        inputs = [x.clone() if is_written else x for x, is_written in both]
        for true, message in zip(self._conditions.forward(*inputs), self._messages, strict=True):
            if not bool(true):
                raise ValueError(message)


def _needed(operations: Sequence[Operation], tensors: Sequence[Tensor]) -> Iterator[Operation]:
    """The operations that tensors depend on, the last one first."""
    places = {place(x) for x in tensors}
    for each in reversed(operations):
        changed = [*tensors_of(each.result), *_written(each)]
        if each.asserts is None and not places.isdisjoint(map(place, changed)):
            if torch.Tag.nondeterministic_seeded in each.call.tags:
                raise RuntimeError(
                    "train must not draw an index or a target at random, since it is looked at "
                    "before the program draws; draw it before, and give it to the step"
                )
            places |= {place(x) for x in tensors_of((each.args, each.kwargs))}
            yield each


def _written(operation: Operation) -> list[Any]:
    return written_tensors(operation.call, operation.args, operation.kwargs)
