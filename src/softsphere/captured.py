"""A training step that a GPU repeats as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from softsphere.cuda_graph import Graph, LostCaptureError
from softsphere.matrix import FactoredTensor, SingularStepError
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.replay import Replay
from softsphere.matrix.turns import turn
from softsphere.optim import FactoredSGD

__all__ = ["CapturedStep", "captures", "check_taken"]

# What a training step returns.
Outputs = Tensor | tuple[Tensor, ...] | None
# Eager steps before the first capture, so that whatever is made once is made.
_WARM_UP = 3


class CapturedStep:
    """Captures a training step as a CUDA graph, and replays it.

    A GPU may run the operations of a step faster than Python launches them. A graph launches them
    all at once. This matters most for a factored layer, whose step is about 150 short operations;
    any other layer with a step of fixed shapes can be captured as well.

    If an address or a number that the graph holds has changed, the next step runs eagerly, and the
    one after it is captured again: when the factors were mended, when an option of an optimizer
    was given another number, when a state was loaded. Options that are tensors on the device can
    change without that, as the learning rate does under a scheduler.

    On a CPU every step runs eagerly, with the same results. The optimizers need not be capturable
    there, and PyTorch's own must not be, unless they are fused.

    Args:
        train: does a step: it sets the gradients to None, computes the loss, calls backward and
            steps the optimizers. It is called with tensors of the shapes of the examples, and
            returns a tensor, a tuple of tensors, or None. It must not read a value on the device.
        optimizer: made with capturable=True on a GPU, torch.optim.SGD with fused=True, or several
            such optimizers as a list or tuple. They step whatever `train` steps, a factored weight
            by FactoredSGD.
        examples: tensors that stand for the inputs; their shapes, dtypes and device are those of
            every input.

    Calling it with inputs takes a step and returns copies of what `train` returned. The first three
    calls run `train` eagerly. A batch with fewer rows is padded by the caller: zeros for hidden,
    and the layer's ignore_index for target.

    Attributes:
        captures: how many graphs have been captured so far; 0 on a CPU.

    Raises TypeError for an optimizer that cannot be captured, and for the factored leaves of a
    ClusteredLoss.
    A call raises ValueError for inputs that do not fit the examples, RuntimeError where `train`
    cannot be captured, and SingularStepError if a step since the last measurement of the factors
    could not be taken; that step and those after it have changed nothing in the factored weight.

    >>> import softsphere
    >>> head = softsphere.FactoredSphericalLoss(8, 1000)
    >>> optimizer = softsphere.optim.FactoredSGD(head.parameters(), lr=10.0, capturable=True)
    >>> def train(hidden, target):
    ...     optimizer.zero_grad()
    ...     loss = head(hidden, target)
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> hidden, target = torch.randn(4, 8), torch.tensor([1, 5, 5, 999])
    >>> step = CapturedStep(train, optimizer, hidden, target)
    >>> step(hidden, target).shape
    torch.Size([])
    """

    def __init__(
        self,
        train: Callable[..., Outputs],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *examples: Tensor,
    ) -> None:
        given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        self._train, self._optimizers = train, given
        if not self._optimizers:
            raise TypeError("optimizer must be an optimizer or several, got none")
        for each in self._optimizers:
            if "capturable" not in getattr(each, "defaults", ()) and not _is_sgd(each):
                raise TypeError(
                    "optimizer must be a softsphere.optim.FactoredSGD, which can step a whole "
                    "model, torch.optim.SGD with fused=True, or one of PyTorch's with the option "
                    f"capturable, got {type(each).__name__}"
                )
        self._inputs = tuple(x.detach().clone() for x in examples)
        self._outputs: Outputs = None
        self._graph: Any = None
        # what the last eager step left, and what the graph holds; see `_held`
        self._left: tuple[Any, ...] = ()
        self._captured: tuple[Any, ...] = ()
        self._recorded: list[Any] = []
        # why a capture did not end in order, after which none is tried
        self._lost: str | None = None
        self._calls = self.captures = 0
        self._matrices()

    def check(self) -> None:
        """Raises SingularStepError if a step since the last measurement was left out.

        Calls find this out at the next measurement of the factors. Check before you keep a state,
        and after the last step. It waits for the device.
        """
        check_taken(self._optimizers)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Takes a step with these inputs, and returns copies of what `train` returns."""
        self._check(inputs)
        if self._lost is not None:
            raise LostCaptureError(self._lost)
        matrices = self._matrices()
        with torch.no_grad():
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given)
        if not captures(self._device):
            return _copied(self._train(*self._inputs))
        self._calls += 1
        with turn():
            now = self._held(matrices)
            if now != self._captured:
                # for good: memory that it holds may come to be where it was, as another tensor's
                self._outputs, self._graph = None, None
            if self._graph is not None:
                return self._replayed(matrices)
        # Elimination asks a library that need not allow a capture. It is for few steps in a row.
        eliminates = any(not matrix.watch.products[0] for matrix in matrices)
        if self._calls <= _WARM_UP or now != self._left or eliminates:
            outputs = _copied(Graph.warmed_up(lambda: self._train(*self._inputs), self._device))
            self._left = self._held(matrices)
            return outputs
        with uninterrupted():
            self._capture(matrices)
            with turn():
                self._captured = self._held(matrices)
                return self._replayed(matrices)

    def _replayed(self, matrices: list[FactoredMatrix]) -> Outputs:
        """Runs the graph, and returns copies of what it filled."""
        with uninterrupted():
            self._graph.replay()
            outputs = _copied(self._outputs)
            refused = []
            for matrix, recorded in zip(matrices, self._recorded, strict=True):
                try:
                    Replay(matrix).after(*recorded)
                except SingularStepError as error:
                    refused.append(error)  # the graph has stepped the others all the same
            if refused:
                raise refused[0]
        return outputs

    def _capture(self, matrices: list[FactoredMatrix]) -> None:
        graph = Graph(self._device)
        with ExitStack() as stack:
            for matrix in matrices:
                stack.enter_context(Replay(matrix).recorded())
            try:
                outputs = graph.record(lambda: self._train(*self._inputs))
            except LostCaptureError as error:
                self._lost = str(error)
                raise
        # an autograd graph that lives on would tie later steps to the stream of the capture
        self._outputs = _each(Tensor.detach, outputs)
        self._recorded = [matrix.recorded_step for matrix in matrices]
        self._graph = graph
        self.captures += 1

    @property
    def _groups(self) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
        """The parameter groups of all optimizers; loading a state puts others in their place."""
        return [(each, group) for each in self._optimizers for group in each.param_groups]

    @property
    def _device(self) -> torch.device:
        """The device of the parameters."""
        first: Tensor = self._groups[0][1]["params"][0]
        return first.device

    def _matrices(self) -> list[FactoredMatrix]:
        """The factored matrices that the optimizers step.

        Raises TypeError for one that cannot be captured.
        """
        found: dict[int, FactoredMatrix] = {}
        for optimizer, group in self._groups:
            _check_can_step(optimizer, group, self._device)
            for p in group["params"]:
                if not isinstance(p, FactoredTensor):
                    continue
                if not isinstance(optimizer, FactoredSGD):
                    raise TypeError(
                        "a factored weight must be stepped by FactoredSGD, got "
                        f"{type(optimizer).__name__}"
                    )
                if p.matrix.arrays.shards is not None:
                    raise TypeError(
                        "a weight with a process_group cannot be captured, since its ranks compare "
                        "their arguments at every call; step it without CapturedStep"
                    )
                if not isinstance(p.matrix, FactoredMatrix):
                    raise TypeError(
                        "the leaves of a ClusteredLoss cannot be captured, since a step asks which "
                        "clusters it meets; step them without CapturedStep"
                    )
                found[id(p.matrix)] = p.matrix
        return list(found.values())

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        """Raises ValueError if the inputs are not like the examples."""
        if len(inputs) != len(self._inputs):
            raise ValueError(f"expected {len(self._inputs)} inputs, got {len(inputs)}")
        for i, (given, example) in enumerate(zip(inputs, self._inputs, strict=True)):
            mine, wanted = (_described(x) for x in (given, example))
            if mine != wanted:
                raise ValueError(
                    f"input {i} must be {wanted}, as the example, got {mine}; pad a smaller batch "
                    "with rows of zeros, whose target is the layer's ignore_index"
                )

    def _held(self, matrices: list[FactoredMatrix]) -> tuple[Any, ...]:
        """All that a graph would hold for ever: the place of each tensor, and numbers of Python."""
        held: list[Any] = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for name, value in group.items():
                    if name not in ("params", "initial_lr"):
                        held.append((name, _place(value)))
                for p in group["params"]:
                    state = optimizer.state.get(p, {})
                    held.append((_place(p), *((name, _place(x)) for name, x in state.items())))
        # last, since it may wait for the step before
        return *held, *(Replay(matrix).before() for matrix in matrices)


def check_taken(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raises SingularStepError if a step of a factored weight was left out on a GPU.

    The weight looks for itself when its factors are measured, which is not in each step.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                matrix = p.matrix if isinstance(p, FactoredTensor) else None
                if not isinstance(matrix, FactoredMatrix) or matrix.watch.refused is None:
                    continue
                matrix.arrays.check()  # finishes the last step, which may prove to be singular
                if bool(matrix.watch.refused):
                    matrix.watch.check(matrix.arrays)


def captures(device: torch.device) -> bool:
    """Whether steps on a device are captured."""
    return device.type == "cuda"


def _check_can_step(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], device: torch.device
) -> None:
    """Raises TypeError if a group of an optimizer cannot be stepped as the device needs it."""
    fused, capturable = group.get("fused"), group.get("capturable")
    if captures(device) and not (fused if _is_sgd(optimizer) else capturable):
        option = "fused" if _is_sgd(optimizer) else "capturable"
        raise TypeError(f"optimizer must be made with {option}=True, and so must all of its groups")
    fused = fused or isinstance(optimizer, FactoredSGD)
    if not captures(device) and capturable and not fused:
        raise TypeError(
            f"optimizer is an {type(optimizer).__name__} with capturable=True, which PyTorch does "
            f"not step on a {device.type}; make it with capturable=False there, or with fused=True"
        )


def _is_sgd(optimizer: Any) -> bool:
    """Whether it is PyTorch's SGD, which reads nothing from the device if it is fused."""
    return isinstance(optimizer, torch.optim.SGD)


def _place(x: Any) -> Any:
    """The place of an ordinary tensor in memory; anything else as it is."""
    if isinstance(x, FactoredTensor):
        return id(x.matrix)
    return ("at", x.data_ptr()) if isinstance(x, Tensor) else x


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype} on {x.device}"


def _copied(outputs: Any) -> Outputs:
    """Copies, which the next step does not overwrite."""
    return _each(lambda x: x.detach().clone(), outputs)


def _each(change: Callable[[Tensor], Tensor], outputs: Any) -> Outputs:
    """Changes each tensor of what `train` returns. Raises TypeError for anything else."""
    if outputs is None:
        return None
    if isinstance(outputs, Tensor):
        return change(outputs)
    if not (isinstance(outputs, tuple) and all(isinstance(x, Tensor) for x in outputs)):
        raise TypeError(
            f"train must return a tensor, a tuple of tensors or None, got {type(outputs).__name__}"
        )
    return tuple(change(x) for x in outputs)
