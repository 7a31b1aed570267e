"""A matrix whose every row a step may change, at a cost that has nothing of its rows in it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.matrix import upkeep
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.precision import full
from softsphere.matrix.refusals import stale
from softsphere.matrix.rows import Rows
from softsphere.matrix.step import SingularStepError, Update, gram_times, plan, times_weight

__all__ = ["Block", "FactoredMatrix", "Health"]


@dataclass(frozen=True)
class Health:
    """How well the factors stand.

    condition: rms over i of ‖U_i·‖ ‖U⁻¹_·i‖, by which a rounding error in V is amplified in W
    inverse_drift: ‖U U⁻¹ − I‖ / √w, U's rows scaled to norm 1
    gram_drift: largest relative error of xᵀ Q x against ‖W x‖² over random x; nan if not asked for
    shift: ‖1 ωᵀ‖ / ‖W‖
    generations: in how many of them V has rows
    renewed, refactorised, reinverted, regrammed: how often a generation was begun, V written anew,
        U⁻¹ and Q computed anew
    seconds: spent on all of that
    """

    condition: float
    inverse_drift: float
    gram_drift: float
    shift: float
    generations: int
    renewed: int
    refactorised: int
    reinverted: int
    regrammed: int
    seconds: float


class FactoredMatrix:
    """W = V U + 1 ωᵀ (D, w) with what is kept beside it, its steps and its upkeep.

    Args:
        blocks: (D, w_j) float32 or float64, the columns of W side by side. They are kept, not
            copied, and changed in place.
        pi: (D) positive with Σ π = D, the base measure; None for one everywhere.

    A step costs O(r w² + r² w) for a gradient of r factors, nothing in D.
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
        self.watch = upkeep.Watch()
        # what refers to the second block of columns
        self.beside: weakref.ref[Block] | None = None

    @classmethod
    def of(cls, arrays: Arrays) -> FactoredMatrix:
        """The matrix with these arrays."""
        matrix = cls.__new__(cls)
        matrix.arrays, matrix.watch = arrays, upkeep.Watch()
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
        """What takes the step of `transform_` when it is called. Nothing has changed until then.

        Raises: SingularStepError where the step cannot be taken.
        """
        W = self.arrays
        W.check()
        if len(blocks.spread) != W.blocks:
            raise ValueError(f"blocks must be for {W.blocks} blocks, got {len(blocks.spread)}")
        update = self.planned(gradient, blocks)
        if update.refused is not None:
            raise SingularStepError(update.refused)
        edition = W.edition

        def take() -> None:
            # a step that was planned at another W would spoil Q, w̄ and U⁻¹
            if W.edition != edition:
                raise stale()
            self.commit(update, blocks)

        return take

    @full
    def planned(self, gradient: GradientFactors, blocks: Blocks) -> Update:
        W = self.arrays
        update = plan(W, gradient, blocks, self.watch.refused)
        if update.refused is None and upkeep.too_harsh(W, update):
            self.watch.prepare(W, gradient, update.blocks)
            update = plan(W, gradient, blocks, self.watch.refused)
        return update

    @full
    def commit(self, update: Update, blocks: Blocks) -> None:
        """Writes a planned step, and mends the factors when it is time."""
        with upkeep.uninterrupted():
            update.commit(self.arrays)
            self.watch.refused = update.flag
        self.watch.after_step(self.arrays, blocks, update.share)

    def transform_(self, gradient: GradientFactors, blocks: Blocks) -> None:
        """[W₁ … W_k] ← [W₁ … W_k] (base ⊗ I) + G (spread ⊗ I), G with respect to W₁.

        Raises: SingularStepError, with nothing changed, where the step would make U singular or
        holds a value that is not finite.
        """
        self.plan(gradient, blocks)()

    def add_(self, gradient: GradientFactors, alpha: float = 1.0, decay: float = 0.0) -> None:
        """W ← (1 − decay) W + alpha G. Raises: as `transform_`."""
        self.transform_(gradient, Blocks(((1 - decay,),), (alpha,)))

    @full
    def dot(self, one: GradientFactors, two: GradientFactors) -> Tensor:
        """tr(G₁ᵀ Π G₂), the inner product of two gradients taken at W, in O(r² d)."""
        W, d = self.arrays, self.arrays.width
        # of both gradients' factors side by side, the second's right factors alone
        both = one if one is two else one * 0.0 + two
        cross = gram_times(W, both)[: one.rank]
        result = (cross * one.H).sum(dtype=torch.float64)
        for rho, other in ((one.rho, two), (two.rho, one)):
            if rho:
                result += rho * (times_weight(W, other) * other.H).sum(dtype=torch.float64)
        if one.rho and two.rho:
            result += one.rho * two.rho * W.gram.diagonal()[:d].sum()
        return result

    def norm(self, gradient: GradientFactors) -> Tensor:
        """√tr(Gᵀ Π G), the Frobenius norm of the gradient with respect to diag(√π) W."""
        return self.dot(gradient, gradient).clamp_min(0).sqrt()

    @full
    def gradient_chunks(self, gradient: GradientFactors, part: slice) -> Tensor:
        """G[part] without the rows that E adds to."""
        W = self.arrays
        rows = W.outputs(W.coordinates(part), W.block(0))
        whole = rows @ gradient.A.to(rows.dtype) + gradient.b.to(rows.dtype)
        return whole + gradient.rho * rows if gradient.rho else whole

    @full
    def to_dense_gradient(self, gradient: GradientFactors) -> Tensor:
        """G as a new tensor (D, d)."""
        W = self.arrays
        dense = torch.empty(W.num_rows, W.width, dtype=W.dtype, device=W.device)
        for part in W.V.chunks():
            dense[part] = self.gradient_chunks(gradient, part)
        return dense.index_add_(0, gradient.rows, gradient.X.to(dense.dtype))

    @full
    def canonical_(self) -> None:
        """Writes V as W, so that it can be read and saved as it is. O(D w²).

        What follows is the same whether the factors go on or V is saved and loaded.
        """
        W = self.arrays
        W.check()
        if not W.is_written:
            upkeep.rebase(W, torch.eye(W.V.width, dtype=torch.float64, device=W.device))
            W.is_written = True
            W.forget_gram()
            self.watch.restart()

    @full
    def rewrite_(self, j: int, change: Callable[[slice, Tensor], Tensor]) -> None:
        """Block j of W becomes change(part, its rows there), a chunk of rows at a time. O(D w²)."""
        self.canonical_()
        with upkeep.uninterrupted():
            self.arrays.begin_change()
            self.arrays.rewrite_(j, change)
            self.arrays.is_written = True
        self.watch.restart()

    def scale_(self, j: int, scale: float) -> None:
        """Block j of W times a number that is not zero. O(w²)."""
        k = self.arrays.blocks
        base = [[float(a == b) for b in range(k)] for a in range(k)]
        base[j][j] = scale
        W = self.arrays
        blocks = Blocks(tuple(map(tuple, base)), (0.0,) * k)
        nothing = GradientFactors.zero(W.width, torch.empty(0, dtype=W.dtype, device=W.device))
        self.transform_(nothing, blocks)

    @full
    def reset_(self) -> None:
        """Takes V for W, whatever was written into it."""
        self.arrays.V.note()
        self.arrays.reset_()
        self.watch.restart()

    @full
    def copied(self, j: int, device: torch.device, dtype: torch.dtype) -> FactoredMatrix:
        """Block j in memory of its own."""
        W = self.arrays
        W.check()
        if W.blocks == 1:
            other = FactoredMatrix.of(W.copied(device, dtype))
            return other
        sizes = [block.shape[1] for block in W.V.blocks[:-1]] if j == 0 else [W.width]
        dense = W.to_dense(columns=W.block(j)).to(device, dtype)
        pi = None if W.pi is None else W.pi.to(device, dtype)
        other = FactoredMatrix(*dense.split(sizes, 1), pi=pi)
        if j == 0:
            other.arrays.edition = W.edition
        return other

    @full
    def widen_(self, block: Block, blocks: Blocks, values: Tensor | None = None) -> None:
        """Puts a second block of columns beside W, `block` its owner. O(D w).

        values: (D, w) what it begins with; None for zeros, which are written in the basis that
        `blocks` only scales.
        """
        W = self.arrays
        self.part_()
        size = W.width
        eye = torch.eye(2, dtype=torch.float64, device=W.device)
        if values is None:
            basis = torch.tensor(blocks.eigenbasis(), dtype=torch.float64, device=W.device)
            values = torch.zeros(W.num_rows, size, dtype=W.dtype, device=W.device)
        else:
            self.canonical_()
            basis = eye
            W.forget_gram()
        pad = torch.nn.functional.pad
        known = None if basis is eye else W.sums()
        with upkeep.uninterrupted():
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

    @full
    def part_(self) -> None:
        """Leaves the first block alone; the second goes to its owner, if there still is one."""
        W = self.arrays
        if W.blocks == 1:
            return
        owner = None if self.beside is None else self.beside()
        self.canonical_()
        with upkeep.uninterrupted():
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

    @full
    def refactorise_(self) -> None:
        """V ← W, U ← I, ω ← 0, in row chunks and in place; W is what it was. O(D w²)."""
        W = self.arrays
        upkeep.rebase(W, torch.eye(W.V.width, dtype=torch.float64, device=W.device))

    @full
    def renew_(self) -> None:
        """Begins a new generation; W is what it was. O(w³), nothing in D but a glance at it."""
        upkeep.renew(self.arrays, self.watch.basis(self.arrays))

    def condition(self) -> float:
        """See `Health.condition`."""
        return upkeep.condition(self.arrays)

    @full
    def health(self, probes: int = 4) -> Health:
        """Measures the factors; `probes` > 0 also reads W once, O(D w probes), for gram_drift."""
        W = self.arrays
        return Health(
            condition=upkeep.condition(W),
            inverse_drift=upkeep.inverse_drift(W),
            gram_drift=upkeep.gram_drift(W, probes),
            shift=upkeep.shift_share(W),
            generations=sum(count > 0 for count in W.generations.counts()),
            seconds=self.watch.seconds,
            **self.watch.done,
        )

    @full
    def mend_(self) -> None:
        """Checks now and does what is needed."""
        start = time.perf_counter()
        self.watch.check(self.arrays)
        self.watch.seconds += time.perf_counter() - start


class Block:
    """Which columns of which matrix a tensor is: block j. Tensors that are the same share it.

    multiple: its edition, that of the matrix which it was made of, and what that was multiplied by
    """

    def __init__(self, matrix: FactoredMatrix, j: int = 0) -> None:
        self.matrix, self.j = matrix, j
        self.multiple: tuple[str, str, float] | None = None

    def of(self) -> tuple[str | None, float]:
        """The edition that this is a known multiple of: its own, or that which it was made of.

        None for a momentum, which is a multiple of no weight.
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
