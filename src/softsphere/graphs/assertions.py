"""What has to be true before a program is run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softsphere._torch import operation_name
from softsphere.graphs.drawing import Drawing
from softsphere.graphs.recorder import Operation, Recorder
from softsphere.graphs.tensors import place, tensors_of

__all__ = ["Assertions"]

# Indexing by a permutation is something that TorchInductor of torch 2.13 fails to compile.
_EARLY = {"aten::randperm"}


class Assertions:
    """What a record asserts, to be looked at before its program is run.

    What depends on random numbers is looked at with those that the program goes on with. So they
    are drawn here.

    inputs: the memory that was there before on which all this depends
    drawing: the operations that draw, which are no part of the program
    drawn: what they have drawn when they were recorded

    Raises RuntimeError where numbers are drawn into memory that has other ones.
    """

    def __init__(self, recorder: Recorder) -> None:
        asserted = [each for each in recorder.operations if each.asserts is not None]
        self._messages = [each.asserts for each in asserted]
        conditions = [each.args[0] for each in asserted]
        early = [x for x in recorder.operations if operation_name(x.call) in _EARLY]
        needed = _needed(recorder.operations, [*conditions, *tensors_of([x.result for x in early])])
        self.drawing = [x for x in needed if torch.Tag.nondeterministic_seeded in x.call.tags]
        if any(each.written for each in self.drawing):
            raise RuntimeError(
                "train must not fill an index or a target with random numbers in place; draw it as "
                "a new tensor, as by torch.randint, or before the step and give it as an input"
            )
        self.drawn = tensors_of([x.result for x in self.drawing])
        needed, copies = _with_copies(needed, self.drawing)
        drawing = Drawing(recorder, needed)
        self._graph = drawing.returning([*conditions, *copies])
        # what is written on the way to a condition is changed in the program, and not here
        written = {place(x) for each in needed for x in each.written}
        self.inputs = [x.detach() for x in drawing.inputs]
        self._written = [place(x) in written for x in drawing.inputs]

    def check(self) -> list[Tensor]:
        """Returns what is drawn for this run.

        Raises ValueError with the message of the first assertion that does not hold.
        """
        both = zip(self.inputs, self._written, strict=True)
        inputs = [x.clone() if is_written else x for x, is_written in both]
        random = torch.get_rng_state() if self.drawn else None
        found = self._graph.forward(*inputs)
        for true, message in zip(found, self._messages, strict=False):
            if not bool(true):
                if random is not None:
                    torch.set_rng_state(random)
                raise ValueError(message)
        return list(found[len(self._messages) :])


def _needed(operations: Sequence[Operation], tensors: Sequence[Tensor]) -> list[Operation]:
    """The operations that tensors depend on, in their order."""
    places, needed = {place(x) for x in tensors}, []
    for each in reversed(operations):
        changed = [*tensors_of(each.result), *each.written]
        if each.asserts is None and not places.isdisjoint(map(place, changed)):
            places |= {place(x) for x in each.given}
            needed.append(each)
    return needed[::-1]


def _with_copies(
    operations: Sequence[Operation], drawing: Sequence[Operation]
) -> tuple[list[Operation], list[Tensor]]:
    """The operations with copies of what is drawn, made before it may be changed in place."""
    found: list[Operation] = []
    copies: list[Tensor] = []
    for each in operations:
        found.append(each)
        if any(each is x for x in drawing):
            drawn = tensors_of(each.result)
            new = [Operation(torch.ops.aten.clone.default, (x,), {}, x.clone()) for x in drawn]
            found += new
            copies += [x.result for x in new]
    return found, copies
