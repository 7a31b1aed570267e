"""Rows, columns and the transpose of a factored weight, as views that are read when used."""

from __future__ import annotations

from typing import Any

import torch

from softsphere._torch import wrapper_tensor
from softsphere.matrix.abstract import Block
from softsphere.matrix.wrapper import Wrapper

__all__ = ["Part"]


class Part(Wrapper):
    """Rows or columns of a FactoredTensor, or its transpose.

    Like a view of an ordinary tensor, a part shows the weight as it is when it is read, and what
    is written into the part is written into the weight. Writing into it costs O(D w²), since all of
    the weight is written again.

    `recipe` lists the views that lead from the weight to the part, each as (operation, arguments
    after the first, keyword arguments).
    """

    block: Block
    recipe: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

    @staticmethod
    def __new__(cls, block: Block, recipe: list[Any]) -> Part:
        W = block.matrix.arrays
        shape = torch.empty(W.num_rows, W.width, dtype=W.dtype, device="meta")
        for func, args, kwargs in recipe:
            shape = func(shape, *args, **kwargs)
        self = wrapper_tensor(cls, tuple(shape.shape), W.dtype, W.device, shape.stride())
        self.block, self.recipe = block, recipe
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Returns its present numbers. Only a part that autograd does not follow has a copy."""
        if not self.is_leaf:
            raise RuntimeError(
                "a part of a factored weight that is in an autograd graph cannot be copied; copy "
                "part.detach()"
            )
        memo[id(self)] = copied = self.detach().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A part is saved as its present numbers."""
        return self.detach().clone().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        """Raises TypeError; a clone is an ordinary tensor."""
        raise TypeError("a Part has no memory for NumPy to read; use part.detach().clone()")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        try:
            numbers = str(self.detach().clone())[7:-1]
        except TypeError:  # those of a transpose, which are D × w
            numbers = f"shape={tuple(self.shape)}, dtype={self.dtype}"
        return f"Part({numbers})"
