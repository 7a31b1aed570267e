"""A layer whose weight may be factored, and must then be a parameter under its own name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from softsphere.matrix import FactoredTensor

__all__ = ["WithFactoredParameter", "check_factored_dtype"]


def check_factored_dtype(dtype: Any) -> None:
    """Raises TypeError for a dtype in which there are no factored weights."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"dtype must be torch.float32 or torch.float64, got {dtype!r}; a factored weight is "
            "float32 or float64, and for half precision around it there is torch.autocast"
        )


class WithFactoredParameter(nn.Module):
    """A module that keeps a factored parameter under the name `weight` alone."""

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
