"""A layer whose weight may be factored, and must then be a parameter under its own name."""

from __future__ import annotations

from typing import Any

from torch import nn

from softsphere.matrix import FactoredTensor

__all__ = ["WithFactoredParameter"]


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
