"""A training step that a GPU repeats as one CUDA graph, or a CPU as one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from softsphere.checks.settings import flag
from softsphere.checks.steps import check_options, check_step, inputs_like
from softsphere.graphs import compiled, cuda
from softsphere.graphs.cuda import LostCaptureError
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
    """Captures a training step as a CUDA graph, or compiles it for a CPU, and replays it.

    A GPU may run the operations of a step faster than Python launches them. A graph launches them
    all at once. This matters most for a factored layer, whose step is about 150 short operations;
    any other layer with a step of fixed shapes can be captured as well.

    If an option, a parameter or a factor that the graph holds has changed, the next step runs
    eagerly, and the one after it is captured again: when the factors were mended, when an option of
    an optimizer was given another number, when a state was loaded or a layer was frozen. Options
    that are tensors on the device can change without that, as the learning rate does under a
    scheduler.

    What Python does in `train` is done when it is captured, and not in later steps: make another
    CapturedStep after `model.eval()`, after a change of a layer's options, as of its reduction, and
    for another stage of training. What `train` keeps from step to step is kept by `copy_` into a
    tensor that stays the same.

    On a CPU every step runs eagerly, with the same results, unless `compile` is set. The optimizers
    need not be capturable there, and PyTorch's own must not be, unless they are fused.

    A compiled step is recorded as a graph would be. TorchInductor makes one program of it, which
    may take half a minute. A program is made whenever a graph would be captured, unless an equal
    one is there. Once the factors of a weight have been renewed, Python takes its steps faster and
    does so again; `state_dict()` of its layer writes all rows anew, after which steps are compiled
    again.

    Args:
        train: does a step: it sets the gradients to None, computes the loss, calls backward and
            steps the optimizers, last of all, a factored weight once. It is called with tensors of
            the shapes of the examples, and returns a tensor, a tuple of tensors, or None. It must
            not read a value on the device, nor any value in a step that is compiled.
        optimizer: made with capturable=True on a GPU, torch.optim.SGD with fused=True, or several
            such optimizers as a list or tuple. They step whatever `train` steps, a factored weight
            by FactoredSGD.
        examples: tensors that stand for the inputs; their shapes, dtypes and device are those of
            every input.
        compile: whether a CPU compiles the step, for which TorchInductor needs a C++ compiler. The
            optimizers are then made as for a GPU, and stepped last, PyTorch's own with fused=True.
            No `.grad` is kept. A GPU captures the step either way.

    Calling it with inputs takes a step and returns copies of what `train` returned. The first three
    calls run `train` eagerly. A batch with fewer rows is padded by the caller: zeros for hidden,
    and the layer's ignore_index for target.

    Attributes:
        captures: how many graphs have been captured, or steps recorded for a program, so far. 0
            also after many calls, if Python takes the steps.

    Raises TypeError for what is no training step, for an optimizer that cannot be captured, and for
    the factored leaves of a ClusteredLoss.
    A call raises TypeError or ValueError for inputs that do not fit the examples or require a
    gradient, ValueError where a compiled step meets an index out of range, RuntimeError where
    `train` cannot be captured or compiled, and SingularStepError if a step since the last
    measurement of the factors could not be taken; that step and those after it have changed nothing
    in the factored weight.

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
        compile: bool = False,
    ) -> None:
        self._train, self._optimizers = train, check_step(train, optimizer, examples)
        self._inputs = tuple(x.detach().clone() for x in examples)
        self._compile = flag("compile", compile)
        self._outputs: Outputs = None
        self._graph: Any = None
        # what the last eager step left, and what the graph holds; see `_held`
        self._left: tuple[Any, ...] = ()
        self._captured: tuple[Any, ...] = ()
        self._recorded: list[Any] = []
        # the matrices that the last eager step changed
        self._stepped: list[FactoredMatrix] = []
        # why a capture did not end in order, after which none is tried
        self._lost: str | None = None
        self._calls = self.captures = 0
        self._matrices = self._captured_matrices()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a CapturedStep cannot be copied or saved, since it holds the tensors of its layers; "
            "make one for the copy"
        )

    def check(self) -> None:
        """Raises SingularStepError if a step since the last measurement was left out.

        Calls find this out at the next measurement of the factors. Check before you keep a state,
        and after the last step. It waits for the device.
        """
        check_taken(self._optimizers)

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Takes a step with these inputs, and returns copies of what `train` returns."""
        inputs_like(self._inputs, inputs)
        if self._lost is not None:
            raise LostCaptureError(self._lost)
        with turn(), torch.no_grad():
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given)
            if self._graph is not None:
                if self._held() == self._captured and self._graph.is_current():
                    self._calls += 1
                    return self._replayed()
                # for good: memory that it holds may come to be where it was, as another tensor's
                self._outputs, self._graph = None, None
        self._matrices = self._captured_matrices()
        self._calls += 1
        if not self._is_captured or self._pays_no_more():
            return _copied(self._train(*self._inputs))
        # Elimination asks a library that need not allow a capture. It is for few steps in a row.
        eliminates = any(not matrix.watch.products[0] for matrix in self._stepped)
        if self._calls <= _WARM_UP or eliminates or self._held() != self._left:
            editions = [matrix.edition for matrix in self._matrices]
            step = self._kind_of_graph.warmed_up(lambda: self._train(*self._inputs), self._device)
            outputs = _copied(step)
            both = zip(self._matrices, editions, strict=True)
            self._stepped = [matrix for matrix, edition in both if matrix.edition != edition]
            self._left = self._held()
            return outputs
        # a Ctrl-C ends a compilation, which takes seconds, and waits for a capture
        with uninterrupted() if captures(self._device) else nullcontext():
            self._capture()
            with turn(), torch.no_grad():
                self._captured = self._held()
                return self._replayed()

    def _pays_no_more(self) -> bool:
        """Whether Python takes steps faster than a program for a CPU would.

        Python multiplies the rows of those generations that a batch meets, and a program would do
        so with each that there is.
        """
        if captures(self._device):
            return False
        return not all(matrix.arrays.generations.alone for matrix in self._matrices)

    def _replayed(self) -> Outputs:
        """Runs the graph, and returns copies of what it filled."""
        with uninterrupted():
            self._graph.replay()
            outputs = _each(self._graph.handed_out, self._outputs)
            refused = []
            for matrix, recorded in zip(self._matrices, self._recorded, strict=True):
                try:
                    if recorded is not None:
                        Replay(matrix).after(*recorded)
                except SingularStepError as error:
                    refused.append(error)  # the graph has stepped the others all the same
            if refused:
                raise refused[0]
        return outputs

    def _capture(self) -> None:
        graph = self._kind_of_graph(self._device)
        gradients = [p.grad for p in self._parameters]
        with uninterrupted(), ExitStack() as stack:
            for matrix in self._matrices:
                stack.enter_context(Replay(matrix).recorded())
            try:
                outputs = graph.record(lambda: self._train(*self._inputs))
            except LostCaptureError as error:
                self._lost = str(error)
                raise
            finally:
                self._forget_gradients_but(gradients)
        # an autograd graph that lives on would tie later steps to the stream of the capture
        outputs = _each(Tensor.detach, outputs)
        recorded = [matrix.recorded_step for matrix in self._matrices]
        graph.fill(_tensors_in((outputs, recorded)), self._addresses())
        self._outputs, self._recorded, self._graph = outputs, recorded, graph
        self.captures += 1

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for _, group in self._groups for p in group["params"]]

    def _forget_gradients_but(self, kept: list[Tensor | None]) -> None:
        """Drops the gradients that were made by a step that was compiled, which are not filled."""
        if captures(self._device):
            return
        for p, grad in zip(self._parameters, kept, strict=True):
            if p.grad is not grad:
                p.grad = None

    @property
    def _groups(self) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
        """The parameter groups of all optimizers; loading a state puts others in their place."""
        return [(each, group) for each in self._optimizers for group in each.param_groups]

    @property
    def _is_captured(self) -> bool:
        """Whether steps are captured, or compiled."""
        return self._compile or captures(self._device)

    @property
    def _kind_of_graph(self) -> Any:
        return cuda.Graph if captures(self._device) else compiled.Graph

    @property
    def _device(self) -> torch.device:
        """The device of the parameters."""
        return self._parameters[0].device

    def _captured_matrices(self) -> list[FactoredMatrix]:
        """The factored matrices that the optimizers step.

        Raises TypeError for one that cannot be captured.
        """
        found: dict[int, FactoredMatrix] = {}
        for optimizer, group in self._groups:
            is_ours, on_cpu = isinstance(optimizer, FactoredSGD), not captures(self._device)
            check_options(optimizer, group, is_ours, on_cpu, self._is_captured)
            for p in group["params"]:
                if not isinstance(p, FactoredTensor):
                    continue
                if not is_ours:
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

    def _addresses(self) -> set[int]:
        """Where the memory is that changes with what is held, and that of the inputs."""
        return {*_numbers_in(self._held()), *(x.data_ptr() for x in self._inputs)}

    def _held(self) -> tuple[Any, ...]:
        """All that a graph would hold for ever: the place of each tensor, and numbers of Python."""
        held: list[Any] = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for name, value in group.items():
                    if name not in ("params", "initial_lr"):
                        held.append((name, _place(value)))
                for p in group["params"]:
                    state = optimizer.state.get(p, {})
                    held.append(
                        (
                            _place(p),
                            p.requires_grad,
                            *((name, _place(x)) for name, x in state.items()),
                        )
                    )
        # last, since it may wait for the step before
        return *held, *(Replay(matrix).before() for matrix in self._matrices)


def check_taken(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raises SingularStepError if a captured or compiled step of a factored weight was left out.

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


def _place(x: Any) -> Any:
    """The place of an ordinary tensor in memory; anything else as it is."""
    if isinstance(x, FactoredTensor):
        return id(x.matrix)
    return ("at", x.data_ptr()) if isinstance(x, Tensor) else x


def _tensors_in(x: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dataclasses, also those that these have computed."""
    if isinstance(x, Tensor):
        return [x]
    if is_dataclass(x):
        x = list(vars(x).values())
    return [y for each in x for y in _tensors_in(each)] if isinstance(x, tuple | list) else []


def _numbers_in(x: Any) -> list[int]:
    """The integers in nested tuples."""
    if isinstance(x, tuple):
        return [y for each in x for y in _numbers_in(each)]
    return [x] if isinstance(x, int) else []


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
