"""Every engine of a linear layer. A new one joins the tests of agreement by one line here."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from _cases import CASES
from softsphere import LinearSphericalOptions, losses
from softsphere.engines import dispatch
from softsphere.engines.operators import LinearOperator

# Small chunks, so that there are several of them, the last one not full.
ENGINES = {
    "dense": LinearSphericalOptions(engine="dense"),
    "chunked": LinearSphericalOptions(engine="chunked", row_chunk=5, class_chunk=100),
    "gram": LinearSphericalOptions(engine="gram", class_chunk=100),
}

# The engines that are operators.
OPERATORS = {
    name: dispatch.ENGINES[name].statistics
    for name in ENGINES
    if isinstance(dispatch.ENGINES[name].statistics, LinearOperator)
}

SPHERICAL = {name: case[0] for name, case in CASES.items() if isinstance(case[0], losses.Spherical)}


def layer(m, D, d, dtype=torch.float64, bias=True, seed=0) -> tuple[Tensor, Tensor, Tensor | None]:
    """H, W, b that want gradients; the outputs have a mean of their own."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    H, W, b = new(m, d), 0.5 * new(D, d) + 0.2, new(D) if bias else None
    return tuple(None if x is None else x.to(dtype).requires_grad_() for x in (H, W, b))


def with_gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """The loss, and its gradients for upstream gradients that differ from row to row."""
    inputs = [x for x in inputs if x is not None]
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    if loss.dim() == 0:
        upstream = torch.full_like(loss, 1.7)
    return [loss, *torch.autograd.grad(loss, inputs, upstream)]


class Largest(TorchDispatchMode):
    """The most entries of a tensor that was made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_iter(result) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *made])
        return result


@contextmanager
def flops_of_calls(engines, *methods):
    """Yields a list that gets the FLOPs of each call of these methods of operators.

    They are counted inside of the calls, which hide them from a counter outside.
    """
    found, real = [], [(each, name, getattr(each, name)) for each in engines for name in methods]

    def counting(compute):
        def count(*args):
            with FlopCounterMode(display=False) as counter:
                out = compute(*args)
            found.append(counter.get_total_flops())
            return out

        return count

    for engine, name, compute in real:
        object.__setattr__(engine, name, counting(compute))
    try:
        yield found
    finally:
        for engine, name, compute in real:
            object.__setattr__(engine, name, compute)
