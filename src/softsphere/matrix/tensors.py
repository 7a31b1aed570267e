"""A factored weight and its gradient as tensors that PyTorch's own tools can handle.

`FactoredTensor` is the (D, w) weight, `StructuredGradient` its gradient. Neither ever holds D × w
numbers of its own for a step: what an operation of PyTorch does with them stands in `table.py`, and
an operation that is not there is refused.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from softsphere.matrix.factored_matrix import Block, FactoredMatrix
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.refusals import stale
from softsphere.matrix.wrapper import Wrapper

__all__ = ["Content", "FactoredTensor", "Operand", "Part", "StructuredGradient"]

Operand = Tensor | float


class FactoredTensor(Wrapper):
    """diag(√π) [W b] as a tensor (D, w), w = d or d + 1, kept in factors.

    Steps of `torch.optim.SGD`, scaling, averaging, norms, reading of rows and products H Wᵀ are
    exact; a step costs O(r w² + r² w) for a gradient of r rows, whatever D is. What would need all
    D × w numbers raises TypeError. With a prior the tensor is diag(√π) [W b], which is what SGD
    steps; `FactoredSphericalLoss.dense()` is [W b] itself.

    Args:
        weight: (D, d) float32 or float64. It is kept, not copied, and changed in place.
        bias: (D), one more column, or None.
        pi: (D) positive with Σ π = D, the base measure; None for one everywhere.

    Raises: TypeError for a weight of another dtype or number of dimensions.
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
        cls, weight: Tensor, bias: Tensor | None = None, pi: Tensor | None = None
    ) -> FactoredTensor:
        columns = (weight,) if bias is None else (weight, bias.unsqueeze(1))
        return cls.alias(Block(FactoredMatrix(*columns, pi=pi)))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def alias(cls, block: Block) -> FactoredTensor:
        """The tensor that those columns are."""
        W = block.matrix.arrays
        self = torch.Tensor._make_wrapper_subclass(
            cls, (W.num_rows, W.width), dtype=W.dtype, device=W.device
        )
        self.block = block
        return self

    def become(self, other: FactoredTensor) -> None:
        self.block = other.block

    @property
    def matrix(self) -> FactoredMatrix:
        """The factors, of which this tensor is the first block of columns or the second."""
        return self.block.matrix

    def is_finite(self) -> Tensor:
        """Whether each number is finite: (D, w), without memory for them if all are."""
        W = self.matrix.arrays
        W.check()
        if bool((W.centred_gram.diagonal() + W.colsum).isfinite().all()):
            return torch.ones((), dtype=torch.bool, device=self.device).expand(self.shape)
        return self.to_dense().isfinite()

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """The D × w numbers as an ordinary tensor."""
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
            raise RuntimeError("only leaves can be copied by copy.deepcopy; detach the weight")
        other = memo.get(id(self.block))
        if other is None:
            matrix = self.matrix.copied(self.block.j, self.device, self.dtype)
            other = memo[id(self.block)] = Block(matrix)
        result = same_kind(self, FactoredTensor.alias(other))
        memo[id(self)] = result
        # copies of parameters have no gradient in PyTorch, copies of other leaves have
        if self.grad is not None and not isinstance(self, torch.nn.Parameter):
            result.grad = self.grad.__deepcopy__(memo)
        return result

    def __copy__(self) -> FactoredTensor:
        return same_kind(self, FactoredTensor.alias(self.block))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuild, self.pickled()

    def pickled(self) -> tuple[Any, ...]:
        """What `rebuild` takes: columns, base measure, and what kind of leaf it is."""
        matrix = self.matrix
        if matrix.arrays.blocks > 1:
            matrix = matrix.copied(self.block.j, self.device, self.dtype)
        matrix.canonical_()
        W = matrix.arrays
        return list(W.V.blocks), W.pi, self.requires_grad, isinstance(self, torch.nn.Parameter)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        raise TypeError(
            "a factored weight cannot go into a compiled graph or an exported program. Its layer "
            "stays out of compiled graphs by itself; head.to_linear() with a criterion, and "
            'LinearSphericalLoss with options=LinearSphericalOptions(engine="dense"), can be '
            "compiled whole and exported"
        )


def same_kind(like: Tensor, made: FactoredTensor) -> FactoredTensor:
    """A new leaf that is a parameter, and requires a gradient, if `like` is and does."""
    return kind(made, like.requires_grad, isinstance(like, torch.nn.Parameter))


def kind(made: FactoredTensor, requires_grad: bool, is_parameter: bool) -> FactoredTensor:
    if is_parameter:
        return torch.nn.Parameter(made, requires_grad)  # type: ignore[return-value]
    made.requires_grad_(requires_grad)
    return made


def rebuild(
    columns: list[Tensor], pi: Tensor | None, requires_grad: bool, is_parameter: bool
) -> FactoredTensor:
    """What pickle makes a factored tensor of."""
    made = FactoredTensor.alias(Block(FactoredMatrix(*columns, pi=pi)))
    return kind(made, requires_grad, is_parameter)


def sent(x: FactoredTensor) -> Any:
    """To another process as a copy: PyTorch would share V, and each would step it by itself."""
    buffer = io.BytesIO()
    torch.save(x.pickled(), buffer)
    return received, (buffer.getvalue(),)


def received(data: bytes) -> FactoredTensor:
    """What `sent` has sent."""
    return rebuild(*torch.load(io.BytesIO(data)))


ForkingPickler.register(FactoredTensor, sent)


@dataclass
class Content:
    """What a gradient is now. Tensors that are the same gradient share it.

    value: the factors. block: of which weight. edition: of the weight, when the gradient was taken;
    None for zero, which is a gradient at every weight.
    """

    value: GradientFactors
    block: Block
    edition: str | None

    def set(self, value: GradientFactors, edition: str | None) -> None:
        self.value, self.edition = value, edition

    def current(self) -> GradientFactors:
        """The factors, if the weight is still what it was.

        Raises: RuntimeError where it has been changed since.
        """
        if self.edition not in (None, self.block.matrix.edition):
            raise stale()
        return self.value


class StructuredGradient(Wrapper):
    """The gradient of a spherical loss with respect to a FactoredTensor: (D, w), in O(r w) numbers.

    It means something only beside the weight that it was taken at. Added to another one's, or used
    after the weight has changed, it raises RuntimeError. Sums, multiples, the 2-norm and
    `torch.dot` with another gradient are exact and cost nothing in D.
    """

    content: Content
    described = "the gradient of a factored weight"

    @staticmethod
    def __new__(cls, content: Content) -> StructuredGradient:
        W = content.block.matrix.arrays
        H = content.value.H
        self = torch.Tensor._make_wrapper_subclass(
            cls, (W.num_rows, W.width), dtype=H.dtype, device=H.device
        )
        self.content = content
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def become(self, other: StructuredGradient) -> None:
        self.content = other.content

    @property
    def value(self) -> GradientFactors:
        """The factors."""
        return self.content.value

    def is_finite(self) -> Tensor:
        """Whether each number is finite: (D, w), without memory for them if all are."""
        if bool(self.value.is_finite()):
            return torch.ones((), dtype=torch.bool, device=self.device).expand(self.shape)
        return self.to_dense().isfinite()

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """The D × w numbers as an ordinary tensor."""
        value, W = self.content.current(), self.content.block.matrix
        dense = W.to_dense_gradient(value)
        if W.arrays.pi is not None:
            dense *= W.arrays.pi.sqrt().unsqueeze(1)
        return dense.to(dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StructuredGradient(shape={tuple(self.shape)}, factors={self.value.rank})"

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredGradient:
        known = memo.get(id(self.content))
        if known is None:
            block = memo.get(id(self.content.block), self.content.block)
            known = Content(self.value, block, self.content.edition)
            memo[id(self.content)] = known
        return StructuredGradient(known)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a StructuredGradient cannot be pickled, since it means nothing without its weight; "
            "save the layer's state_dict() after the step, or gradient.to_dense()"
        )

    __tensor_flatten__ = FactoredTensor.__tensor_flatten__


class Part(Wrapper):
    """Rows or columns of a FactoredTensor, or its transpose, computed when they are used.

    Like a view of an ordinary tensor it shows the weight as it is when it is read, and what is
    written into it is written into the weight, all of which is then written anew, in O(D w²).

    recipe: the views that lead to it, (operation, arguments after the first, keyword arguments)
    """

    block: Block
    recipe: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

    @staticmethod
    def __new__(cls, block: Block, recipe: list[Any]) -> Part:
        W = block.matrix.arrays
        shape = torch.empty(W.num_rows, W.width, dtype=W.dtype, device="meta")
        for func, args, kwargs in recipe:
            shape = func(shape, *args, **kwargs)
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape.shape, strides=shape.stride(), dtype=W.dtype, device=W.device
        )
        self.block, self.recipe = block, recipe
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Part({str(self.detach().clone())[7:-1]})"
