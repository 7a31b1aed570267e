"""A factored layer in a state_dict: weight, bias and prior, as a dense layer has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softsphere import checks
from softsphere.matrix.factored_matrix import FactoredMatrix

__all__ = ["LayerState", "saved"]


def saved(matrix: FactoredMatrix, has_bias: bool) -> dict[str, Tensor]:
    """Returns weight (D, d), bias (D) and prior (D), ordinary tensors.

    Weight and bias are the memory of the layer itself. When the layer is stepped they become
    copies, if somebody still holds them.
    """
    matrix.canonical_()
    W = matrix.arrays
    state = {"weight": W.V.lend(0)}
    if has_bias:
        state["bias"] = W.V.lend(1).squeeze(1)
    if W.pi is not None:
        state["prior"] = W.pi.clone()
    return state


@dataclass(frozen=True)
class LayerState:
    """The entries of a state_dict that belong to one factored layer, by their names in it.

    given: the entries.
    shapes: of weight and bias, as the layer has them.
    pi: (D) the prior of the layer, or None.
    dtype: of the layer once it is loaded.
    """

    given: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    pi: Tensor | None
    dtype: torch.dtype

    def missing(self) -> list[str]:
        """Names that must be there. An nn.Linear has no prior, which then stays as it is."""
        return [name for name in self.shapes if name not in self.given]

    def unexpected(self) -> list[str]:
        """Names that the layer does not know."""
        known = {*self.shapes} if self.pi is None else {*self.shapes, "prior"}
        return [name for name in self.given if name not in known]

    def errors(self, prefix: str) -> list[str]:
        """What does not fit, in PyTorch's words where it has some."""
        wrong = [
            f"size mismatch for {prefix}{name}: copying a param with shape "
            f"{tuple(self.given[name].shape)}, the shape in current model is {shape}."
            for name, shape in self.shapes.items()
            if name in self.given and tuple(self.given[name].shape) != shape
        ]
        if self.dtype not in (torch.float32, torch.float64):
            wrong.append(
                f"{prefix}weight must be float32 or float64 to be assigned, got {self.dtype}."
            )
            return wrong
        try:
            self.prior()
        except (TypeError, ValueError) as error:
            wrong.append(f"{prefix}prior cannot be loaded: {error}")
        return wrong

    def prior(self) -> Tensor | None:
        """The prior of the layer once it is loaded, normalised.

        Raises ValueError or TypeError for one that cannot be the prior of the layer.
        """
        if self.pi is None or "prior" not in self.given:
            return self.pi
        given: Tensor = self.given["prior"]
        pi = checks.prior(given, self.dtype)
        checks.class_vector("prior", pi, self.shapes["weight"][0])
        # It was normalised when it was saved. Normalised again it might differ in the last bit.
        return given.detach().clone() if given.dtype == self.dtype else pi

    def columns(self) -> list[Tensor]:
        """Weight and bias."""
        return [self.given[name].detach() for name in self.shapes]
