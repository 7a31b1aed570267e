"""A stand-in for CUDA graphs on a CPU: records the operations of a function, and runs them again.

As a CUDA graph it knows memory alone. Nothing that Python decides meanwhile is in it, a function
that reads a value cannot be recorded, and recording leaves all memory as it was. What a function
has made holds NaN until the record is run.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softsphere import unread
from softsphere.graphs import compiled, cuda
from softsphere.matrix.wrapper import Wrapper

# Operations that wait for a device, or copy from the host, which a CUDA graph refuses.
READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "multinomial"),
    *("repeat_interleave", "_linalg_check_errors", "lift_fresh"),
}
# Operations that write into what they are given, and do not say so.
WRITES = {"native_batch_norm"}
# What the package asks of a device, and what a GPU answers.
ANSWERS = {
    **{"values_on_cpu": False, "is_asynchronous": True, "captures": True},
    "_multiplies_float64_slowly": False,
}


def pretend_a_gpu(monkeypatch) -> None:
    """Has the package treat a CPU as a device whose values it must not look at."""
    for name, module in list(sys.modules.items()):
        if name.startswith("softsphere"):
            for question, answer in ANSWERS.items():
                if hasattr(module, question):
                    monkeypatch.setattr(module, question, lambda *_, answer=answer: answer)
            if hasattr(module, "graph_is_captured"):
                monkeypatch.setattr(module, "graph_is_captured", RecordedGraph.is_recording)
    monkeypatch.setattr(cuda, "Graph", RecordedGraph)


def compile_by_python(monkeypatch) -> None:
    """Has steps compiled on a CPU, by programs of Python, which take no time to be made."""
    look_at_no_value(monkeypatch)
    monkeypatch.setattr(compiled, "by_inductor", lambda graph, inputs, options: graph)


def look_at_no_value(monkeypatch) -> None:
    """Has other steps look at no value either, as those before a capture do."""
    monkeypatch.setattr(unread._now, "unread", True)


# How a CPU can take steps as they are captured.
WAYS = {"captured": pretend_a_gpu, "compiled": compile_by_python}


def step_below(head, optimizer):
    """A step of a head alone, which returns the loss and the gradient for a trunk outside."""

    def train(hidden, target):
        optimizer.zero_grad()
        hidden = hidden.detach().requires_grad_()
        loss = head(hidden, target)
        loss.backward()
        optimizer.step()
        return loss, hidden.grad

    return train


class RecordedGraph(TorchDispatchMode):
    """The operations of a function, each with the tensors that it reads and writes."""

    recording = False

    def __init__(self, device) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def warmed_up(function, device):
        return function()

    def record(self, function):
        random, RecordedGraph.recording = torch.get_rng_state(), True
        try:
            with self:
                return function()
        finally:
            RecordedGraph.recording = False
            torch.set_rng_state(random)
            for *_, results in self.operations:
                for x in results:
                    if x.is_floating_point():
                        x.fill_(torch.nan)
            for whole, saved in self.before.values():
                whole.copy_(saved)

    @staticmethod
    def is_recording() -> bool:
        return RecordedGraph.recording

    def fill(self, tensors, known) -> None:
        """All that was made is filled."""

    def is_current(self) -> bool:
        return True

    def handed_out(self, x):
        return x.clone()

    def replay(self) -> None:
        # as they were recorded: some operations keep less for a backward without a gradient
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, results in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(results, _tensors(again), strict=False):
                    old.copy_(new)

    @property
    def counts(self) -> Counter[str]:
        """How often each operation is launched."""
        return Counter(_name(func) for func, *_ in self.operations)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, Wrapper) for x in given):
            return NotImplemented
        if _name(func) in READS:
            raise RuntimeError(f"{_name(func)} reads a value, which no graph can hold")
        if _name(func).startswith("index") and any(x.dtype == torch.bool for x in _masks(args)):
            raise RuntimeError(f"{_name(func)} by a mask reads how many it chooses")
        written = func._schema.is_mutable
        if written or _name(func) in WRITES:
            for x in given:
                self._save(x)
        results = func(*args, **kwargs)
        places = {x.untyped_storage().data_ptr() for x in given}
        made = _tensors(results)
        is_view = made and all(x.untyped_storage().data_ptr() in places for x in made)
        if written or not is_view:
            # detached, since a later operation may change the shape in place
            new = [] if written else [x.detach() for x in made]
            self.operations.append((func, args, kwargs, new))
        return results

    def _save(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.before[storage.data_ptr()] = whole, whole.clone()


def _name(func) -> str:
    return func._schema.name.split("::")[-1]


def _masks(args) -> list[Tensor]:
    """The indices of an operation, which may be masks."""
    return _tensors([x for x in args[1:2] if isinstance(x, list | tuple)])


def _tensors(x) -> list[Tensor]:
    return [y for y in tree_leaves(x) if isinstance(y, Tensor)]
