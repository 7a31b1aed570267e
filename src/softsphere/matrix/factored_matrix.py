"""A matrix whose rows may all change in a step, at a cost that does not grow with their number."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_products import dense_gradient, inner_product
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.mending import rebase, renew
from softsphere.matrix.precision import in_full_precision
from softsphere.matrix.refusals import stale
from softsphere.matrix.rows import Rows
from softsphere.matrix.step import SingularStepError, Update, plan
from softsphere.matrix.upkeep import Watch, too_harsh
from softsphere.matrix.wear import Health, health

__all__ = ["Block", "FactoredMatrix"]


class FactoredMatrix:
    """W = V U + 1 ωᵀ (D, w) with the arrays kept beside it, its steps and its upkeep.

    Args:
        blocks: (D, w_j) float32 or float64, the columns of W side by side. They are not copied,
            and they are changed in place.
        pi: (D) positive with Σ π = D, the base measure; None for one everywhere.

    A step costs O(r w² + r² w) for a gradient of r factors, whatever D is.
    Raises TypeError for blocks of another dtype or number of dimensions.
    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; 2016, arXiv:1606.08061.

    >>> W = FactoredMatrix(torch.ones(5, 2))
    >>> W.arrays.gram
    tensor([[5., 5.],
            [5., 5.]], dtype=torch.float64)
    """

    def __init__(self, *blocks: Tensor, pi: Tensor | None = None) -> None:
        for block in blocks:
            if block.dim() != 2 or block.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    "weight must be a (D, d) tensor of float32 or float64, "
                    f"got {tuple(block.shape)} of {block.dtype}"
                )
        self.arrays = Arrays(Rows(*blocks), pi)
        self.watch = Watch()
        # the owner of the second block of columns
        self.beside: weakref.ref[Block] | None = None

    @classmethod
    def of(cls, arrays: Arrays) -> FactoredMatrix:
        """Returns the matrix with these arrays."""
        matrix = cls.__new__(cls)
        matrix.arrays, matrix.watch = arrays, Watch()
        matrix.beside = None
        return matrix

    @property
    def device(self) -> torch.device:
        return self.arrays.device

    @property
    def edition(self) -> str:
        """The name of the present value of W."""
        self.arrays.check()
        return self.arrays.edition

    def plan(self, gradient: GradientFactors, blocks: Blocks) -> Callable[[], None]:
        """Returns a function that takes the step of `transform_`; nothing changes until its call.

        Raises SingularStepError if the step cannot be taken.
        """
        W = self.arrays
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
            self._commit(update, blocks)

        return take

    @in_full_precision
    def _planned(self, gradient: GradientFactors, blocks: Blocks) -> Update:
        W = self.arrays
        update = plan(W, gradient, blocks, self.watch.refused)
        if update.refused is None and too_harsh(W, update):
            self.watch.prepare(W, gradient, update.blocks)
            update = plan(W, gradient, blocks, self.watch.refused)
        return update

    @in_full_precision
    def _commit(self, update: Update, blocks: Blocks) -> None:
        """Writes a planned step, and mends the factors when it is time."""
        with uninterrupted():
            update.commit(self.arrays)
            self.watch.refused = update.flag
        self.watch.after_step(self.arrays, blocks, update.share)

    def transform_(self, gradient: GradientFactors, blocks: Blocks) -> None:
        """[W₁ … W_k] ← [W₁ … W_k] (base ⊗ I) + G (spread ⊗ I), with a gradient G of W₁.

        Raises SingularStepError, with nothing changed, if the step would make U singular, holds
        a value that is not finite, or makes squares of W overflow.
        """
        self.plan(gradient, blocks)()

    def add_(self, gradient: GradientFactors, alpha: float = 1.0, decay: float = 0.0) -> None:
        """W ← (1 − decay) W + alpha G, with the errors of `transform_`."""
        self.transform_(gradient, Blocks(((1 - decay,),), (alpha,)))

    @in_full_precision
    def dot(self, one: GradientFactors, two: GradientFactors) -> Tensor:
        """tr(G₁ᵀ Π G₂), the inner product of two gradients taken at W, in O(r² d)."""
        return inner_product(self.arrays, one, two)

    def norm(self, gradient: GradientFactors) -> Tensor:
        """√tr(Gᵀ Π G), the Frobenius norm of the gradient with respect to diag(√π) W."""
        return self.dot(gradient, gradient).clamp_min(0).sqrt()

    @in_full_precision
    def to_dense_gradient(self, gradient: GradientFactors) -> Tensor:
        """G as a new tensor (D, d)."""
        return dense_gradient(self.arrays, gradient)

    @in_full_precision
    def canonical_(self) -> None:
        """Writes V as W, so that it can be read and saved as it is. O(D w²).

        Later steps give the same numbers whether they go on from here or V is saved and loaded.
        """
        W = self.arrays
        W.check()
        if not W.is_written:
            rebase(W, torch.eye(W.V.width, dtype=torch.float64, device=W.device))
            W.is_written = True
            W.forget_gram()
            self.watch.restart()

    @in_full_precision
    def rewrite_(self, j: int, change: Callable[[slice, Tensor], Tensor]) -> None:
        """Replaces block j of W by change(part, its rows there), in row chunks. O(D w²)."""
        self.canonical_()
        with uninterrupted():
            self.arrays.begin_change()
            self.arrays.rewrite_(j, change)
            self.arrays.is_written = True
        self.watch.restart()

    def scale_(self, j: int, scale: float) -> None:
        """Multiplies block j of W by a number that is not zero. O(w²)."""
        W, k = self.arrays, self.arrays.blocks
        base = [[float(a == b) for b in range(k)] for a in range(k)]
        base[j][j] = scale
        blocks = Blocks(tuple(map(tuple, base)), (0.0,) * k)
        nothing = GradientFactors.zero(W.width, torch.empty(0, dtype=W.dtype, device=W.device))
        self.transform_(nothing, blocks)

    @in_full_precision
    def reset_(self) -> None:
        """Takes V for W after V was written."""
        self.arrays.V.note()
        self.arrays.reset_()
        self.watch.restart()

    @in_full_precision
    def copied(self, j: int, device: torch.device, dtype: torch.dtype) -> FactoredMatrix:
        """Returns a copy of block j as a matrix of its own."""
        W = self.arrays
        W.check()
        if W.blocks == 1:
            return FactoredMatrix.of(W.copied(device, dtype))
        sizes = [block.shape[1] for block in W.V.blocks[:-1]] if j == 0 else [W.width]
        dense = W.to_dense(columns=W.block(j)).to(device, dtype)
        pi = None if W.pi is None else W.pi.to(device, dtype)
        other = FactoredMatrix(*dense.split(sizes, 1), pi=pi)
        if j == 0:
            other.arrays.edition = W.edition
        return other

    @in_full_precision
    def widen_(self, block: Block, blocks: Blocks, values: Tensor | None = None) -> None:
        """Puts a second block of columns beside W. O(D w).

        Args:
            block: the owner of the new columns.
            blocks: κ of the steps to come.
            values: (D, w) the first values of the columns. None stands for zeros, which are
                written in the basis that `blocks` only scales.
        """
        W = self.arrays
        self.part_()
        size, known = W.width, None
        if values is None:
            basis = torch.tensor(blocks.eigenbasis(), dtype=torch.float64, device=W.device)
            values = torch.zeros(W.num_rows, size, dtype=W.dtype, device=W.device)
            known = W.sums()
        else:
            basis = torch.eye(2, dtype=torch.float64, device=W.device)
            self.canonical_()
        pad = torch.nn.functional.pad
        with uninterrupted():
            W.begin_change()
            W.V.blocks.append(values.to(W.device, W.dtype).contiguous())
            W.V.note()
            W.generations.widen(2 * size)
            W.U = torch.kron(basis, W.U.contiguous())
            W.U_inv = torch.kron(torch.linalg.inv(basis).contiguous(), W.U_inv.contiguous())
            W.omega = pad(W.omega, (0, size))
            W.known = None
            if known is not None:
                W.known = pad(known[0], (0, size, 0, size)), pad(known[1], (0, size))
            W.changed()
            self.beside = weakref.ref(block)
            block.matrix, block.j = self, 1
        self.watch.restart()

    @in_full_precision
    def part_(self) -> None:
        """Takes the second block away and gives it to its owner, if the owner still exists."""
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
                owner.matrix, owner.j = FactoredMatrix(values, pi=W.pi), 0
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
        return health(self.arrays, probes, self.watch.seconds, self.watch.done)

    @in_full_precision
    def mend_(self) -> None:
        """Measures the factors now and mends what is beyond its limit."""
        self.watch.check(self.arrays)


class Block:
    """Says which columns of which matrix a tensor stands for: block j.

    Tensors that are the same weight share one Block. `multiple` holds, for a tensor that was made
    by scaling another, its edition, the edition of the other, and the factor.
    """

    def __init__(self, matrix: FactoredMatrix, j: int = 0) -> None:
        self.matrix, self.j = matrix, j
        self.multiple: tuple[str, str, float] | None = None

    def of(self) -> tuple[str | None, float]:
        """Returns an edition and the factor by which this block is a multiple of it.

        The edition is its own or that of the matrix it was made of. It is None for a momentum,
        which is a multiple of no weight.
        """
        edition = self.matrix.edition
        if self.j:
            return None, 1.0
        if self.multiple is not None and self.multiple[0] == edition:
            return self.multiple[1:]
        return edition, 1.0

    @property
    def columns(self) -> slice:
        return self.matrix.arrays.block(self.j)
