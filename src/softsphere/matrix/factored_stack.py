"""Many factored matrices, stepped together at a cost that does not grow with their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softsphere.matrix.abstract import Block, Matrix
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.precision import in_full_precision
from softsphere.matrix.refusals import stale
from softsphere.matrix.rows import Rows
from softsphere.matrix.stack_arrays import StackArrays
from softsphere.matrix.stack_mending import rewrite_rows
from softsphere.matrix.stack_products import dense_stack_gradient, stack_inner_product
from softsphere.matrix.stack_step import StackUpdate, plan_stack
from softsphere.matrix.stack_upkeep import StackWatch, too_harsh_steps
from softsphere.matrix.stack_wear import stack_health
from softsphere.matrix.update import SingularStepError
from softsphere.matrix.wear import Health

__all__ = ["FactoredStack"]


class FactoredStack(Matrix):
    """C matrices W_c = V_c U_c + 1 ω_cᵀ, whose rows one after another are those of W (D, w).

    Args:
        columns: (D, w_j) float32 or float64, the columns of W side by side. They are not copied,
            and they are changed in place.
        starts: (C + 1) int64, where the rows of each matrix begin, and D. A matrix may have none.
        pi: (D) positive, the base measure; its sum over each matrix is the number of its rows.
            None stands for one everywhere.

    A step costs O(w²) for each row of the batch, whatever D and C are, and touches no matrix that
    has no row in the batch. There is no momentum.
    Raises TypeError or ValueError for other columns or starts.
    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091, for one matrix.

    >>> W = FactoredStack(torch.ones(5, 2), starts=torch.tensor([0, 2, 5]))
    >>> W.arrays.colsum
    tensor([[2., 2.],
            [3., 3.]], dtype=torch.float64)
    """

    arrays: StackArrays

    def __init__(self, *columns: Tensor, starts: Tensor, pi: Tensor | None = None) -> None:
        for block in columns:
            if block.dim() != 2 or block.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    "weight must be a (D, d) tensor of float32 or float64, "
                    f"got {tuple(block.shape)} of {block.dtype}"
                )
        D = len(columns[0])
        if starts.is_floating_point() or starts.dim() != 1 or len(starts) < 1:
            raise TypeError(
                "starts must be a (C + 1) tensor of integers, "
                f"got {tuple(starts.shape)} of {starts.dtype}"
            )
        if not starts.is_meta:
            ends = int(starts[0]), int(starts[-1])
            if ends != (0, D) or bool((starts.diff() < 0).any()):
                raise ValueError(
                    f"starts must ascend from 0 to the {D} rows of weight, got {starts.tolist()}"
                )
        # On the meta device they would lose their values.
        device = starts.device if columns[0].is_meta else columns[0].device
        self.arrays = StackArrays(Rows(*columns), starts.to(device, torch.long), pi)
        self.watch = StackWatch(self.arrays)

    @classmethod
    def of(cls, arrays: StackArrays) -> FactoredStack:
        """Returns the stack with these arrays."""
        stack = cls.__new__(cls)
        stack.arrays, stack.watch = arrays, StackWatch(arrays)
        return stack

    def plan(self, gradient: GradientFactors, blocks: Blocks) -> Callable[[], None]:
        W = self.arrays
        W.check()
        update = self._planned(gradient, blocks)
        if update.refused is not None:
            raise SingularStepError(update.refused)
        edition = W.edition

        def take() -> None:
            # A step that was planned at another W would spoil the arrays kept beside V.
            if W.edition != edition:
                raise stale()
            self._commit(update)

        return take

    @in_full_precision
    def _planned(self, gradient: GradientFactors, blocks: Blocks) -> StackUpdate:
        W = self.arrays
        update = plan_stack(W, gradient, blocks)
        if update.refused is not None:
            return update
        harsh = too_harsh_steps(W, update)
        for part, chosen in harsh:
            self.watch.prepare(W, part, update.kappa, chosen)
        return plan_stack(W, gradient, blocks) if harsh else update

    @in_full_precision
    def _commit(self, update: StackUpdate) -> None:
        """Writes a planned step, and mends the factors of the matrices whose time has come."""
        with uninterrupted():
            update.commit(self.arrays)
        self.watch.after_step(self.arrays, update.ids, update.share)

    def zero(self) -> GradientFactors:
        W = self.arrays
        like = torch.empty(0, dtype=W.dtype, device=W.device)
        zero = GradientFactors.zero(W.width, like)
        return replace(zero, cluster=zero.rows)

    @in_full_precision
    def dot(self, one: GradientFactors, two: GradientFactors) -> Tensor:
        """See `Matrix.dot`. O(w²) for each factor."""
        return stack_inner_product(self.arrays, one, two)

    @in_full_precision
    def to_dense_gradient(self, gradient: GradientFactors) -> Tensor:
        return dense_stack_gradient(self.arrays, gradient)

    def forget_wear(self) -> None:
        self.watch.restart(self.arrays)

    @in_full_precision
    def canonical_(self) -> None:
        W = self.arrays
        W.check()
        if not W.is_written:
            self.refactorise_()
            W.is_written = True
            W.forget_gram()
            self.forget_wear()

    def like(self, columns: Sequence[Tensor], pi: Tensor | None) -> FactoredStack:
        return FactoredStack(*columns, starts=self.arrays.starts, pi=pi)

    @in_full_precision
    def copied(self, j: int, device: torch.device, dtype: torch.dtype) -> FactoredStack:
        W = self.arrays
        W.check()
        return FactoredStack.of(W.copied(device, dtype))

    def widen_(self, block: Block, blocks: Blocks, values: Tensor | None = None) -> None:
        """Raises TypeError, since a stack of matrices has no momentum."""
        raise TypeError(
            "a stack of factored matrices, the leaves of a clustered layer, cannot be stepped with "
            "momentum; put its weight into a group with momentum=0, or use another engine"
        )

    def part_(self) -> None:
        """Does nothing: there is no second block of columns."""

    @in_full_precision
    def refactorise_(self) -> None:
        """V ← W, U_c ← I, ω_c ← 0, in place and in pieces; W is unchanged. O(D w²)."""
        W = self.arrays
        eye = torch.eye(W.width, dtype=torch.float64, device=W.device)
        for ids in W.split(W.all_ids()):
            rewrite_rows(W, ids, eye.expand(len(ids), -1, -1))

    @in_full_precision
    def health(self, probes: int = 4) -> Health:
        """Measures the factors; each number is that of the worst matrix.

        With `probes` > 0, W is read once for gram_drift, O(D w probes).
        """
        return stack_health(self.arrays, probes, self.watch.seconds, self.watch.done)

    @in_full_precision
    def mend_(self) -> None:
        """Measures all factors now and mends what is beyond its limit."""
        self.watch.check(self.arrays, self.arrays.all_ids()[self.arrays.sizes > 0])
