"""A factored weight as a tensor that PyTorch's own tools can handle.

`FactoredTensor` is the (D, w) weight. `table` says what each operation of PyTorch does with it, and
an operation that is not in the table is refused.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import wrapper_tensor
from softsphere.matrix.abstract import Block, Matrix
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.factored_stack import FactoredStack
from softsphere.matrix.refusals import COMPILED
from softsphere.matrix.turns import turn
from softsphere.matrix.wrapper import Wrapper
from softsphere.parallel import Shards

__all__ = ["FactoredTensor"]


class FactoredTensor(Wrapper):
    """diag(√π) [W b] as a tensor (D, w), w = d or d + 1, kept in factors.

    Steps of `torch.optim.SGD`, scaling, averaging, norms, reading rows and products H Wᵀ are exact.
    A step costs O(r w² + r² w) for a gradient of r rows, whatever D is. With a prior the tensor is
    diag(√π) [W b], since that is what SGD steps; `FactoredSphericalLoss.dense()` returns [W b].
    `to_dense()` returns the D × w numbers of this tensor.

    Args:
        weight: (D, d) float32 or float64. It is not copied, and it is changed in place.
        bias: (D), one more column, or None.
        pi: (D) positive with Σ π = D, the base measure; None for one everywhere.
        shards: what a layer with a process group knows of it. Weight, bias and π are then those
            of the rows of this rank, and so is the tensor.

    Raises TypeError for a weight of another dtype or number of dimensions, and for every
    operation that would need all D × w numbers; the error says what to use instead.
    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; 2016, arXiv:1606.08061.

    >>> W = FactoredTensor(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> W, W.norm()
    (FactoredTensor(shape=(2, 2), dtype=torch.float32), tensor(5.))
    >>> W.mul_(2)[1]
    Part([0., 8.])
    """

    block: Block

    @staticmethod
    def __new__(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        pi: Tensor | None = None,
        shards: Shards | None = None,
    ) -> FactoredTensor:
        columns = (weight,) if bias is None else (weight, bias.unsqueeze(1))
        return cls.alias(Block(FactoredMatrix(*columns, pi=pi, shards=shards)))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def stack(
        cls, columns: Sequence[Tensor], starts: Tensor, pi: Tensor | None = None
    ) -> FactoredTensor:
        """Returns the tensor of many factored matrices, whose rows are stepped together.

        Its rows from starts[c] to starts[c + 1] have factors of their own, for a loss that sees
        them alone. Everything else is as for one matrix, but that there is no momentum.

        Args:
            columns: (D, w_j) float32 or float64, side by side. They are not copied.
            starts: (C + 1) integers, from 0 to D.
            pi: (D) positive, with a sum over each matrix that is the number of its rows, or None.
        """
        return cls.alias(Block(FactoredStack(*columns, starts=starts, pi=pi)))

    @classmethod
    def alias(cls, block: Block) -> FactoredTensor:
        """Returns the tensor that stands for those columns."""
        W = block.matrix.arrays
        self = wrapper_tensor(cls, (W.num_rows, W.width), W.dtype, W.device)
        self.block = block
        return self

    def become(self, other: FactoredTensor) -> None:
        self.block = other.block

    @property
    def matrix(self) -> Matrix:
        """The factors; this tensor is their first or second block of columns."""
        return self.block.matrix

    def is_finite(self) -> Tensor:
        """Whether each number is finite: (D, w), without memory for them if all are finite."""
        W = self.matrix.arrays
        with turn():
            W.check()
            if W.sums_are_finite():
                return torch.ones((), dtype=torch.bool, device=self.device).expand(self.shape)
            return self.to_dense().isfinite()

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """Returns the D × w numbers as an ordinary tensor."""
        W = self.matrix.arrays
        W.check()
        dense = W.to_dense(columns=self.block.columns)
        if W.pi is not None:
            dense *= W.pi.sqrt().unsqueeze(1)
        return dense.to(dtype or dense.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"FactoredTensor(shape={tuple(self.shape)}, dtype={self.dtype}{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FactoredTensor:
        if id(self) in memo:
            copied: FactoredTensor = memo[id(self)]
            return copied
        if not self.is_leaf:
            raise RuntimeError(
                "copy.deepcopy copies only leaves of the autograd graph; detach the weight first"
            )
        other = memo.get(id(self.block))
        if other is None:
            matrix = self.matrix.copied(self.block.j, self.device, self.dtype)
            other = memo[id(self.block)] = Block(matrix)
        result = _same_kind(self, FactoredTensor.alias(other))
        memo[id(self)] = result
        # In PyTorch a copy of a parameter has no gradient, a copy of another leaf has one.
        # That of a parameter is not even looked at, which PyTorch allows no other thread to do
        # while one trains it.
        if not isinstance(self, torch.nn.Parameter) and self.grad is not None:
            result.grad = self.grad.__deepcopy__(memo)
        return result

    def __copy__(self) -> FactoredTensor:
        return _same_kind(self, FactoredTensor.alias(self.block))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self.pickled()

    def pickled(self) -> tuple[Any, ...]:
        """Returns the arguments of `_rebuild`: columns, π, starts of a stack, and kind of leaf."""
        matrix = self.matrix
        if matrix.arrays.shards is not None:
            raise TypeError(
                "a factored weight with a process_group cannot be pickled, since it has the rows "
                "of one rank alone; save the state_dict() of its layer with "
                "torch.distributed.checkpoint"
            )
        with turn():
            if matrix.arrays.blocks > 1:
                matrix = matrix.copied(self.block.j, self.device, self.dtype)
            matrix.canonical_()
            W = matrix.arrays
            columns = [W.V.lend(j) for j in range(len(W.V.blocks))]
        kind = self.requires_grad, isinstance(self, torch.nn.Parameter)
        return columns, W.pi, W.starts, *kind

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        raise TypeError(COMPILED)


def _same_kind(like: Tensor, made: FactoredTensor) -> FactoredTensor:
    """Makes a leaf that is a parameter and requires a gradient if `like` is and does."""
    return _kind(made, like.requires_grad, isinstance(like, torch.nn.Parameter))


def _kind(made: FactoredTensor, requires_grad: bool, is_parameter: bool) -> FactoredTensor:
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)  # type: ignore[return-value]
    made.requires_grad_(requires_grad)
    return made


def _rebuild(
    columns: list[Tensor],
    pi: Tensor | None,
    starts: Tensor | None,
    requires_grad: bool,
    is_parameter: bool,
) -> FactoredTensor:
    """Makes a factored tensor of what `FactoredTensor.pickled` returned."""
    if starts is None:
        made = FactoredTensor.alias(Block(FactoredMatrix(*columns, pi=pi)))
    else:
        made = FactoredTensor.stack(columns, starts, pi)
    return _kind(made, requires_grad, is_parameter)


def _sent(x: FactoredTensor) -> Any:
    """Sends a copy to another process. PyTorch would share V, which both would then step."""
    buffer = io.BytesIO()
    torch.save(x.pickled(), buffer)
    return _received, (buffer.getvalue(),)


def _received(data: bytes) -> FactoredTensor:
    """Makes a factored tensor of what `_sent` has sent."""
    return _rebuild(*torch.load(io.BytesIO(data)))


ForkingPickler.register(FactoredTensor, _sent)
