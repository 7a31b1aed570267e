"""The gradient of a factored weight as a tensor that PyTorch's tools can handle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import wrapper_tensor
from softsphere.matrix.abstract import Block
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.refusals import COMPILED, stale
from softsphere.matrix.wrapper import Wrapper

__all__ = ["Content", "StructuredGradient"]


@dataclass
class Content:
    """The present value of a gradient. Tensors that are the same gradient share one Content.

    Args:
        value: the factors.
        block: the weight that this is the gradient of.
        edition: the edition of the weight when the gradient was taken. None stands for a gradient
            that is zero, which is valid at every weight.
    """

    value: GradientFactors
    block: Block
    edition: str | None

    def set(self, value: GradientFactors, edition: str | None) -> None:
        self.value, self.edition = value, edition

    def current(self) -> GradientFactors:
        """Returns the factors.

        Raises RuntimeError if the weight has been changed since the gradient was taken.
        """
        if self.edition not in (None, self.block.matrix.edition):
            raise stale()
        return self.value


class StructuredGradient(Wrapper):
    """The gradient of a spherical loss with respect to a FactoredTensor: (D, w), in O(r w) numbers.

    `loss.backward()` leaves one in `weight.grad`; r is the number of rows of the batch. It means
    something only beside the weight that it was taken at. Sums, multiples, the 2-norm and
    `torch.dot` with another gradient are exact and cost nothing in D. `to_dense()` returns the
    D × w numbers.

    Raises RuntimeError if it is added to a gradient of another weight, or used after the weight
    has changed; TypeError for an operation that needs all its D × w numbers.

    >>> from softsphere import FactoredSphericalLoss
    >>> head = FactoredSphericalLoss(3, 7)
    >>> head(torch.randn(2, 3), torch.tensor([1, 5])).backward()
    >>> head.weight.grad
    StructuredGradient(shape=(7, 4), factors=2)
    """

    content: Content
    described = "the gradient of a factored weight"

    @staticmethod
    def __new__(cls, content: Content) -> StructuredGradient:
        W, H = content.block.matrix.arrays, content.value.H
        self = wrapper_tensor(cls, (W.num_rows, W.width), H.dtype, H.device)
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
        """Whether each number is finite: (D, w), without memory for them if all are finite."""
        if bool(self.value.is_finite()):
            return torch.ones((), dtype=torch.bool, device=self.device).expand(self.shape)
        return self.to_dense().isfinite()

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """Returns the D × w numbers as an ordinary tensor."""
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

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        raise TypeError(COMPILED)
