"""What layers with a factored weight have in common: its name, its gradient, and its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softsphere.matrix import FactoredTensor, StructuredGradient
from softsphere.matrix.rows import Rows

__all__ = ["WithFactoredParameter", "check_factored_dtype", "lent_columns", "size_errors"]


def check_factored_dtype(dtype: Any) -> None:
    """Raises TypeError for a dtype in which there are no factored weights."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"dtype must be torch.float32 or torch.float64, got {dtype!r}; a factored weight is "
            "float32 or float64, and for half precision around it there is torch.autocast"
        )


def lent_columns(V: Rows, *, bias: bool) -> dict[str, Tensor]:
    """Weight (D, d) and bias (D) as a state_dict has them, the memory of V itself.

    V must be W. When W is stepped they become copies, if somebody still holds them.
    """
    weight = {"weight": V.lend(0)}
    return {**weight, "bias": V.lend(1).squeeze(1)} if bias else weight


def size_errors(
    prefix: str, given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Which of the given entries of a state_dict have other shapes, in PyTorch's words."""
    return [
        f"size mismatch for {prefix}{name}: copying a param with shape {tuple(given[name].shape)}, "
        f"the shape in current model is {shape}."
        for name, shape in shapes.items()
        if name in given and tuple(given[name].shape) != shape
    ]


class WithFactoredParameter(nn.Module):
    """A module that keeps a factored parameter under the name `weight` alone."""

    weight: nn.Parameter

    def register_parameter(self, name: str, param: Any) -> None:
        """See `nn.Module.register_parameter`.

        Raises TypeError for a second name of the weight, which pruning would register.
        """
        if isinstance(param, FactoredTensor) and name != "weight":
            raise TypeError(
                f"a factored weight cannot be kept as {name!r}: masks and pruning are for a dense "
                "weight, as LinearSphericalLoss has"
            )
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithFactoredParameter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight: Any = self.weight
        grad = weight.grad
        if (
            isinstance(weight, FactoredTensor)
            and isinstance(grad, StructuredGradient)
            and grad.content.edition in (None, weight.matrix.edition)
        ):
            # The gradient belongs to the converted weight. It would keep the old one otherwise.
            grad.content.block = weight.block
        return self

    def _take(self, made: FactoredTensor) -> None:
        """Makes a new parameter whose columns are the memory of tensors that a caller gave."""
        V = made.matrix.arrays.V
        for j in range(len(V.blocks)):
            V.lend(j)
        self.weight = nn.Parameter(made, self.weight.requires_grad)
