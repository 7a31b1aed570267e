"""What the operations of PyTorch ask of a weight in factors, whichever way the factors are kept."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from softsphere._torch import graph_is_captured
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.precision import in_full_precision
from softsphere.matrix.refusals import refuse_in_record
from softsphere.matrix.rows import Rows
from softsphere.matrix.turns import in_turn, only_thread, turn
from softsphere.parallel import Shards

__all__ = ["POWER", "Block", "Kept", "Matrix"]

# The power with which a factor of W acts on each small array.
POWER = {"U": 1, "U_inv": -1, "centred_gram": 2, "omega": 1, "colsum": 1}


class Kept(ABC):
    """The arrays that are kept of a weight W (D, w): its rows V, and the factors beside them.

    `edition` names the value of W: it changes with each change of W, and copies and conversions of
    W keep it. `is_written` says whether V is W itself. W may consist of several blocks of `width`
    columns side by side: the weight, and an optimizer's momentum.
    """

    V: Rows
    pi: Tensor | None
    width: int
    edition: str
    is_written: bool
    # finishes a step that was left unfinished on the device
    unfinished: Callable[[], None] | None = None
    # whether a step was recorded that nobody has run yet
    is_recorded: bool = False
    # the process group that has the other rows of W
    shards: Shards | None = None
    # the first row of each matrix of a stack, and the number of rows
    starts: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.V.device

    @property
    def dtype(self) -> torch.dtype:
        return self.V.dtype

    @property
    def num_rows(self) -> int:
        """D."""
        return self.V.num_rows

    @property
    def all_rows(self) -> int:
        """D, also where V has only some of the rows of W."""
        return self.num_rows

    @property
    def blocks(self) -> int:
        """The number of blocks of `width` columns."""
        return self.V.width // self.width

    def block(self, j: int) -> slice:
        """Returns the columns of block j."""
        return slice(j * self.width, (j + 1) * self.width)

    def renamed(self) -> None:
        """Notes that W has changed."""
        self.edition = os.urandom(16).hex()

    def begin_change(self) -> None:
        """Prepares for writing: tensors that were handed out keep their values.

        Raises RuntimeError in a record, which would know nothing of what Python notes here.
        """
        refuse_in_record()
        self.begin_step()

    def begin_step(self) -> None:
        """Prepares for a step, which may be recorded."""
        self.check()
        self.V.own()
        self.is_written = False

    def check(self) -> None:
        """Notices changes of V in place by others, and finishes what was left unfinished.

        Where V is W itself, as after `state_dict()`, the change is adopted, and the sums over all
        rows are computed again.

        Raises RuntimeError where V is not W, so that the change has no meaning, and inside the
        capture of a CUDA graph where a step may have to be finished.
        """
        with turn():
            self._check()

    def _check(self) -> None:
        """See `check`."""
        self._finish_step()
        if not self.V.changed_by_others():
            return
        if not self.is_written:
            raise RuntimeError(
                "the rows of a factored weight were changed in place by other means than its own "
                "operations; change it by head.load_state_dict(…) or torch.nn.init, which write "
                "the whole weight"
            )
        self.V.note()
        self.renamed()
        self.forget_gram()

    def finish_step(self) -> None:
        """Finishes a step that was left unfinished on the device, as `check` does."""
        with turn():
            self._finish_step()

    def _finish_step(self) -> None:
        """See `finish_step`."""
        if self.is_recorded:
            raise RuntimeError(
                "train must step a factored weight once, after everything that reads it: a step "
                "that takes much of a direction away is finished when all of train has run; put "
                "what comes later into another function, or take the steps without CapturedStep"
            )
        if self.unfinished is None:
            return
        if graph_is_captured():
            raise RuntimeError(
                "the last step of a factored weight may have to be finished before it is read, "
                "for which a CUDA graph cannot wait; read the weight once before the capture, "
                "as by head.weight.norm(), or capture whole steps by softsphere.CapturedStep"
            )
        finish, self.unfinished = self.unfinished, None
        finish()

    @abstractmethod
    def reset_(self) -> None:
        """Takes V for W."""

    @abstractmethod
    def forget_gram(self) -> None:
        """Has the sums over all rows computed again when they are next needed."""

    @abstractmethod
    def rows(self, index: Tensor | slice, columns: slice = slice(None)) -> Tensor:
        """W[index]: (n, w)."""

    @abstractmethod
    def squares(self) -> Tensor:
        """The sum of squares of each column of W under Π: (w) float64."""

    @abstractmethod
    def sums_are_finite(self) -> bool:
        """Whether the sums over all rows are finite, which W then is too."""

    def chunks(
        self, size: int | None = None, columns: slice = slice(None)
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of rows, W there) over all rows, in pieces of `size` rows or some MiB."""
        for part in self.V.chunks(size):
            yield part, self._chunk(part, columns)

    @in_full_precision
    def _chunk(self, part: slice, columns: slice) -> Tensor:
        """W[part], in memory that no other thread writes before it has been used."""
        if not self.is_written:
            return self.rows(part, columns)
        rows = self.V[part]
        # one block gives a view, whose copy would take more time than one row h needs of it
        is_view = len(self.V.blocks) == 1
        return (rows.clone() if is_view and not only_thread() else rows)[:, columns]

    @in_turn
    def to_dense(self, chunk: int | None = None, columns: slice = slice(None)) -> Tensor:
        """Returns W, or columns of it, as a new tensor (D, w)."""
        width = len(range(*columns.indices(self.V.width)))
        dense = torch.empty(self.num_rows, width, dtype=self.dtype, device=self.device)
        for part, rows in self.chunks(chunk, columns):
            dense[part] = rows
        return dense

    @in_full_precision
    def rewrite_(self, j: int, change: Callable[[slice, Tensor], Tensor]) -> None:
        """Replaces block j of W by change(part, its rows there), in row chunks. O(D w²).

        V must be W; see `Matrix.canonical_`.
        """
        columns = self.block(j)
        for part in self.V.chunks():
            rows = self.V[part]
            new = change(part, rows[:, columns])
            rows = rows.clone()
            rows[:, columns] = new
            self.V[part] = rows
        self.renamed()
        self.forget_gram()


class Matrix(ABC):
    """A weight W (D, w) in factors, with its steps."""

    arrays: Kept
    # the owner of the second block of columns
    beside: weakref.ref[Block] | None = None

    @property
    def device(self) -> torch.device:
        return self.arrays.device

    @property
    def edition(self) -> str:
        """The name of the present value of W."""
        self.arrays.check()
        return self.arrays.edition

    @abstractmethod
    def plan(self, gradient: GradientFactors, blocks: Blocks) -> Callable[[], None]:
        """Returns a function that takes the step of `transform_`; nothing changes until its call.

        Raises SingularStepError if the step cannot be taken.
        """

    def transform_(self, gradient: GradientFactors, blocks: Blocks) -> None:
        """[W₁ … W_k] ← [W₁ … W_k] (base ⊗ I) + G (spread ⊗ I), with a gradient G of W₁.

        Raises SingularStepError, with nothing changed, if the step would make U singular, holds
        a value that is not finite, or makes squares of W overflow.
        """
        self.plan(gradient, blocks)()

    def add_(self, gradient: GradientFactors, alpha: float = 1.0, decay: float = 0.0) -> None:
        """W ← (1 − decay) W + alpha G, with the errors of `transform_`."""
        self.transform_(gradient, Blocks(((1 - decay,),), (alpha,)))

    def scale_(self, j: int, scale: float) -> None:
        """Multiplies block j of W by a number that is not zero, without reading a row of W."""
        k = self.arrays.blocks
        base = [[float(a == b) for b in range(k)] for a in range(k)]
        base[j][j] = scale
        self.transform_(self.zero(), Blocks(tuple(map(tuple, base)), (0.0,) * k))

    @abstractmethod
    def zero(self) -> GradientFactors:
        """Returns the factors of a gradient that is zero."""

    @abstractmethod
    def dot(self, one: GradientFactors, two: GradientFactors) -> Tensor:
        """tr(G₁ᵀ Π G₂), the inner product of two gradients taken at W."""

    def norm(self, gradient: GradientFactors) -> Tensor:
        """√tr(Gᵀ Π G), the Frobenius norm of the gradient with respect to diag(√π) W."""
        return self.dot(gradient, gradient).clamp_min(0).sqrt()

    @abstractmethod
    def to_dense_gradient(self, gradient: GradientFactors) -> Tensor:
        """G as a new tensor (D, w)."""

    @abstractmethod
    def forget_wear(self) -> None:
        """Forgets how worn the factors were, so that the next step is followed by a measurement."""

    @abstractmethod
    def canonical_(self) -> None:
        """Writes V as W, so that it can be read and saved as it is. O(D w²).

        Later steps give the same numbers whether they go on from here or V is saved and loaded.
        """

    @in_full_precision
    def rewrite_(self, j: int, change: Callable[[slice, Tensor], Tensor]) -> None:
        """Replaces block j of W by change(part, its rows there), in row chunks. O(D w²)."""
        self.canonical_()
        with uninterrupted():
            self.arrays.begin_change()
            self.arrays.rewrite_(j, change)
            self.arrays.is_written = True
        self.forget_wear()

    @in_full_precision
    def reset_(self) -> None:
        """Takes V for W after V was written."""
        self.arrays.V.note()
        self.arrays.reset_()
        self.forget_wear()

    @abstractmethod
    def like(self, columns: Sequence[Tensor], pi: Tensor | None) -> Matrix:
        """Returns a matrix of this form with other numbers: its columns side by side, and π."""

    @abstractmethod
    def copied(self, j: int, device: torch.device, dtype: torch.dtype) -> Matrix:
        """Returns a copy of block j as a matrix of its own."""

    @abstractmethod
    def widen_(self, block: Block, blocks: Blocks, values: Tensor | None = None) -> None:
        """Puts a second block of columns beside W. O(D w).

        Args:
            block: the owner of the new columns.
            blocks: κ of the steps to come.
            values: (D, w) the first values of the columns. None stands for zeros.
        """

    @abstractmethod
    def part_(self) -> None:
        """Takes the second block away and gives it to its owner, if the owner still exists."""


class Block:
    """Says which columns of which matrix a tensor stands for: block j.

    Tensors that are the same weight share one Block. `multiple` holds, for a tensor that was made
    by scaling another, its edition, the edition of the other, and the factor.
    """

    def __init__(self, matrix: Matrix, j: int = 0) -> None:
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
