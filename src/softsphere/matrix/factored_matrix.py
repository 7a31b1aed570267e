"""A matrix whose rows may all change in a step, at a cost that does not grow with their number."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softsphere._torch import graph_is_captured
from softsphere.matrix.abstract import Block, Matrix
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_products import dense_gradient, inner_product
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.mending import rebase, renew
from softsphere.matrix.precision import in_full_precision, is_asynchronous
from softsphere.matrix.refusals import refuse_in_record, stale
from softsphere.matrix.rows import Rows
from softsphere.matrix.sharded_arrays import arrays_of
from softsphere.matrix.step import HARSH, plan
from softsphere.matrix.told import Told
from softsphere.matrix.update import SingularStepError, Update
from softsphere.matrix.upkeep import Watch, too_harsh
from softsphere.matrix.wear import Health, health
from softsphere.parallel import Shards
from softsphere.unread import values_unread

__all__ = ["FactoredMatrix", "single_matrix"]


class FactoredMatrix(Matrix):
    """W = V U + 1 ωᵀ (D, w) with the arrays kept beside it, its steps and its upkeep.

    Args:
        blocks: (D, w_j) float32 or float64, the columns of W side by side. They are not copied,
            and they are changed in place.
        pi: (D) positive with Σ π = D, the base measure; None for one everywhere.
        shards: a process group over which the rows are sharded, so that blocks and π are those of
            this rank.

    A step costs O(r w² + r² w) for a gradient of r factors, whatever D is.
    Raises TypeError for blocks of another dtype or number of dimensions.
    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; 2016, arXiv:1606.08061.

    >>> W = FactoredMatrix(torch.ones(5, 2))
    >>> W.arrays.gram
    tensor([[5., 5.],
            [5., 5.]], dtype=torch.float64)
    """

    arrays: Arrays
    # the gradient and the blocks of the step in the last record, if there is one in it
    recorded_step: tuple[GradientFactors, Blocks] | None = None

    def __init__(
        self, *blocks: Tensor, pi: Tensor | None = None, shards: Shards | None = None
    ) -> None:
        for block in blocks:
            if block.dim() != 2 or block.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    "weight must be a (D, d) tensor of float32 or float64, "
                    f"got {tuple(block.shape)} of {block.dtype}"
                )
        self.arrays = arrays_of(Rows(*blocks), pi, shards)
        self.watch = Watch()

    @classmethod
    def of(cls, arrays: Arrays) -> FactoredMatrix:
        """Returns the matrix with these arrays."""
        matrix = cls.__new__(cls)
        matrix.arrays, matrix.watch = arrays, Watch()
        return matrix

    def plan(self, gradient: GradientFactors, blocks: Blocks) -> Callable[[], None]:
        W = self.arrays
        if graph_is_captured() and not self.watch.recording:
            raise RuntimeError(
                "a step of a factored weight cannot be captured as it is, since its factors are "
                "mended between steps; capture it by softsphere.CapturedStep"
            )
        W.check()
        if len(blocks.spread) != W.blocks:
            raise ValueError(f"blocks must be for {W.blocks} blocks, got {len(blocks.spread)}")
        update = self._planned(gradient, blocks)
        if update.refused is not None:
            raise SingularStepError(update.refused)
        edition = W.edition

        def take() -> None:
            # A step that was planned at another W would spoil the arrays kept beside V.
            if W.edition != edition:
                raise stale()
            self._commit(update, gradient, blocks)

        return take

    @in_full_precision
    def _planned(self, gradient: GradientFactors, blocks: Blocks) -> Update:
        W, watch = self.arrays, self.watch
        if is_asynchronous(W.device):
            products = watch.products if watch.recording else (0, 0)
            return plan(W, gradient, blocks, watch.refused, *products)
        watch.tell()  # of steps before this one, which were taken without looking
        update = plan(W, gradient, blocks)
        if update.refused is None and update.share < HARSH and too_harsh(W, update):
            watch.prepare(W, gradient, update.blocks)
            update = plan(W, gradient, blocks)
        return update

    @in_full_precision
    def _commit(self, update: Update, gradient: GradientFactors, blocks: Blocks) -> None:
        """Writes a planned step, and mends the factors when it is time."""
        with uninterrupted():
            update.commit(self.arrays)
            self.watch.note(update)
        if self.watch.recording:
            self.arrays.round_again()
            self.arrays.is_recorded = True
            self.recorded_step = gradient, blocks
        else:
            self.after_step(gradient, blocks, update.share)

    def after_step(self, gradient: GradientFactors, blocks: Blocks, share: float = 1.0) -> None:
        """Counts a step that was taken, and mends the factors when it is time.

        On a GPU the step may have been left undone. It is then finished before anything reads W.
        """
        W, watch = self.arrays, self.watch
        if watch.undone is not None:
            undone = Told(watch.undone)

            def finish() -> None:
                if undone.value():
                    self._finish(gradient, blocks)

            W.unfinished = finish
            if W.shards is not None:
                W.shards.ranks.owe(W.finish_step)
        if watch.is_due(blocks, share):
            W.check()
            watch.check(W)

    @in_full_precision
    def _finish(self, gradient: GradientFactors, blocks: Blocks) -> None:
        """Takes a step that was left undone on the device, as it is taken on a CPU.

        Then the factors are measured, which also tells how later steps can be recorded.
        """
        with values_unread():  # also where it was compiled on a CPU
            self._finish_unread(gradient, blocks)

    def _finish_unread(self, gradient: GradientFactors, blocks: Blocks) -> None:
        W, watch = self.arrays, self.watch
        update = plan(W, gradient, blocks, watch.refused, final=True)
        if too_harsh(W, update):
            watch.prepare(W, gradient, update.blocks)
            update = plan(W, gradient, blocks, watch.refused, final=True)
        with uninterrupted():
            update.commit(W)
            watch.note(update)
            if watch.undone is not None:
                watch.undone.zero_()
        # A refusal is told by the next measurement that is due, and not by whatever reads W first.
        if watch.refused is None or not bool(watch.refused):
            watch.check(W)

    def zero(self) -> GradientFactors:
        W = self.arrays
        return GradientFactors.zero(W.width, torch.empty(0, dtype=W.dtype, device=W.device))

    @in_full_precision
    def dot(self, one: GradientFactors, two: GradientFactors) -> Tensor:
        """See `Matrix.dot`. O(r² d)."""
        return inner_product(self.arrays, one, two)

    @in_full_precision
    def to_dense_gradient(self, gradient: GradientFactors) -> Tensor:
        return dense_gradient(self.arrays, gradient)

    def forget_wear(self) -> None:
        self.watch.restart()

    def reset_(self) -> None:
        refuse_in_record()
        # what was refused, or left unfinished, was a step of another weight
        self.arrays.unfinished = None
        if self.watch.refused is not None:
            self.watch.refused.zero_()
        super().reset_()

    @in_full_precision
    def canonical_(self) -> None:
        refuse_in_record()
        W = self.arrays
        W.check()
        if not W.is_written:
            rebase(W, torch.eye(W.V.width, dtype=torch.float64, device=W.device))
            W.is_written = True
            W.forget_gram()
            self.watch.restart()

    def like(self, columns: Sequence[Tensor], pi: Tensor | None) -> FactoredMatrix:
        return FactoredMatrix(*columns, pi=pi, shards=self.arrays.shards)

    @in_full_precision
    def copied(self, j: int, device: torch.device, dtype: torch.dtype) -> FactoredMatrix:
        W = self.arrays
        W.check()
        if W.blocks == 1:
            return FactoredMatrix.of(W.copied(device, dtype))
        sizes = [block.shape[1] for block in W.V.blocks[:-1]] if j == 0 else [W.width]
        dense = W.to_dense(columns=W.block(j)).to(device, dtype)
        pi = None if W.pi is None else W.pi.to(device, dtype)
        other = FactoredMatrix(*dense.split(sizes, 1), pi=pi, shards=W.shards)
        if j == 0:
            other.arrays.edition = W.edition
        return other

    @in_full_precision
    def widen_(self, block: Block, blocks: Blocks, values: Tensor | None = None) -> None:
        """See `Matrix.widen_`. Zeros are written in the basis that `blocks` only scales."""
        W = self.arrays
        self.part_()
        size, known = W.width, None
        if values is None:
            basis = torch.tensor(blocks.eigenbasis(), dtype=torch.float64, device=W.device)
            values = torch.zeros(W.num_rows, size, dtype=W.dtype, device=W.device)
            known = W.centred_gram, W.colsum
        else:
            # Steps write into it: the caller's own, as in a state that was loaded, stays as it is.
            values = values.to(W.device, W.dtype, copy=True).contiguous()
            basis = torch.eye(2, dtype=torch.float64, device=W.device)
            self.canonical_()
        pad = torch.nn.functional.pad
        with uninterrupted():
            W.begin_change()
            W.V.blocks.append(values)
            W.V.note()
            W.generations.widen(2 * size)
            W.widen(basis)
            W.forget_gram()
            if known is not None:
                W.set_sums(pad(known[0], (0, size, 0, size)), pad(known[1], (0, size)))
            self.beside = weakref.ref(block)
            block.matrix, block.j = self, 1
        self.watch.restart()

    @in_full_precision
    def part_(self) -> None:
        W = self.arrays
        if W.blocks == 1:
            return
        owner = None if self.beside is None else self.beside()
        self.canonical_()
        with uninterrupted():
            W.begin_change()
            values = W.V.blocks.pop()
            W.V.note()
            edition = W.edition
            W.reset_()
            W.edition = edition
            if owner is not None:
                owner.matrix, owner.j = FactoredMatrix(values, pi=W.pi, shards=W.shards), 0
            self.beside = None
        self.watch.restart()

    @in_full_precision
    def refactorise_(self) -> None:
        """V ← W, U ← I, ω ← 0, in place and in row chunks; W is unchanged. O(D w²)."""
        W = self.arrays
        rebase(W, torch.eye(W.V.width, dtype=torch.float64, device=W.device))

    @in_full_precision
    def renew_(self) -> None:
        """Begins a new generation; W is unchanged. O(w³), and a look at each row's generation."""
        renew(self.arrays, self.watch.basis(self.arrays))

    @in_full_precision
    def health(self, probes: int = 4) -> Health:
        """Measures the factors. With `probes` > 0, W is read once for gram_drift, O(D w probes)."""
        self.arrays.check()
        return health(self.arrays, probes, self.watch.seconds, self.watch.done)

    @in_full_precision
    def mend_(self) -> None:
        """Measures the factors now and mends what is beyond its limit."""
        self.arrays.check()
        self.watch.check(self.arrays)


def single_matrix(block: Block) -> FactoredMatrix:
    """Returns the matrix of a block. Raises TypeError if the block is of a stack of matrices."""
    if not isinstance(block.matrix, FactoredMatrix):
        raise TypeError(
            "this layer needs the weight of one matrix, got one of a stack of matrices, which is "
            "the weight of the leaves of a clustered layer"
        )
    return block.matrix
