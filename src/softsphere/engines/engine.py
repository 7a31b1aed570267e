"""What an engine is: its name, what a step costs, and how it finds the statistics of a layer.

A new engine is one file that makes an `Engine`, and one line in `dispatch.ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from softsphere._torch import products_have_out_dtype
from softsphere.engines.machines import Machine, machine

__all__ = ["Engine", "Gradients", "Inputs", "Settings", "Statistics", "Workload", "mass_of"]

# asked once, since compilers trace the choice of an engine
_HALVES_ARE_MULTIPLIED = products_have_out_dtype()


class Inputs(NamedTuple):
    """The tensors that an engine computes with.

    H: (m, d)             the hidden rows
    W: (D, d)             the weight
    b: (D) or None        the bias
    target: (m, K)        the target classes of each row
    pi: (D) or None       the base measure π; zero for a class that takes no part
    """

    H: Tensor
    W: Tensor
    b: Tensor | None
    target: Tensor
    pi: Tensor | None

    @property
    def mass(self) -> float | Tensor:
        return mass_of(self.pi, len(self.W))


def mass_of(pi: Tensor | None, num_classes: int) -> float | Tensor:
    """M = Σ π_k: the number D without a base measure, a float64 scalar tensor with one."""
    return float(num_classes) if pi is None else pi.sum(dtype=torch.float64)


class Settings(NamedTuple):
    """How an engine computes.

    centred: whether the statistics are those of o − μ, with μ = Σ π_k o_k / M the mean output of
        the row; a loss that is invariant to a shift of its outputs asks for this
    row_chunk, class_chunk: rows of H and of W in one piece of work; None leaves it to the engine
    dtype: the dtype of sums, and of s, q and c
    deterministic: whether atomic additions are avoided on a GPU
    """

    centred: bool
    row_chunk: int | None
    class_chunk: int | None
    dtype: torch.dtype
    deterministic: bool


class Gradients(NamedTuple):
    """Upstream gradients of s (m), q (m) and c (m, K)."""

    s: Tensor
    q: Tensor
    c: Tensor


@dataclass(frozen=True)
class Workload:
    """What the cost of a step depends on; `bias` is 1 with a bias and 0 without.

    centred: whether the mean of the outputs is taken off, as for a loss that sees no shift.
    """

    m: int
    D: int
    d: int
    K: int
    bias: int
    dtype: torch.dtype
    device: str
    centred: bool = False

    @property
    def n(self) -> int:
        """The width of [W b]."""
        return self.d + self.bias

    @property
    def machine(self) -> Machine:
        """What work besides products takes on the device."""
        return machine(self.device, self.dtype)

    @property
    def multiplies_halves(self) -> bool:
        """Whether rows of half precision enter products as they are, as on a GPU."""
        return self.device == "cuda" and self.dtype.itemsize == 2 and _HALVES_ARE_MULTIPLIED

    @property
    def passes(self) -> int:
        """The time that all outputs spend in memory, in FLOPs."""
        return self.machine.output * self.m * self.D

    @property
    def target_rows(self) -> int:
        """FLOPs for the rows of W at the targets, where an engine reads them apart."""
        return 6 * self.m * self.K * self.n

    @property
    def outputs_bytes(self) -> int:
        """Memory of the outputs, their gradient, and two tensors of float32 made of them."""
        size = self.dtype.itemsize
        return self.m * self.D * (2 * size + 2 * max(size, 4))


Statistics = Callable[[Inputs, Settings], tuple[Tensor, Tensor, Tensor]]


def _always(work: Workload) -> bool:
    return True


def _no_check(x: Inputs, how: Settings) -> None:
    pass


@dataclass(frozen=True)
class Engine:
    """One way to find s (m), q (m) and c (m, K) of the outputs H Wᵀ + b.

    name: the name that users write in `LinearSphericalOptions`
    statistics: the function itself, differentiable with respect to H, W and b
    cost: FLOPs of a step forward and backward, to which the time for anything else is added as
        the FLOPs that would take as long
    able: whether "auto" may choose the engine for this workload
    chunks: which of "row_chunk" and "class_chunk" have a meaning for it
    transforms: whether it works in forward mode and inside torch.func transforms
    check: raises an error, before anything is computed, for what the engine cannot do
    guarded: computes the statistics where "auto" has chosen the engine, if they need a look at
        their digits, which a named engine goes without
    """

    name: str
    statistics: Statistics
    cost: Callable[[Workload], float]
    able: Callable[[Workload], bool] = _always
    chunks: tuple[str, ...] = ()
    transforms: bool = False
    check: Callable[[Inputs, Settings], None] = _no_check
    guarded: Statistics | None = None
