"""What becomes of the gradient where a loss overflows.

The derivative of log N is 1/N, which is 0 where N overflows. The gradient would look like any other
then, and GradScaler, clipping and the factored step, which look at the gradient alone, would let it
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factors", "with_its_gradient"]


def factors(rows: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Factors (…) of losses (…), which are infinite or NaN where the losses are.

    Their product with the losses is not finite there either, and neither are its derivatives.

    weight: the factors of losses that are finite.
    """
    size = rows.detach().abs()
    return torch.where(size < torch.inf, weight, size)


def with_its_gradient(rows: Tensor) -> Tensor:
    """Returns losses (…) as they are, whose gradients are not finite where they are not."""
    return rows * factors(rows)
