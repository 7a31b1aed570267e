"""(s, q, c) of H Wᵀ + b from the outputs themselves: the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.engines import row_statistics as logits
from softsphere.engines.options import LinearSphericalOptions
from softsphere.stats import Stats

__all__ = ["statistics"]


def statistics(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    *,
    centred: bool,
    options: LinearSphericalOptions,
) -> Stats:
    """Statistics of H (m, d), W (D, d), b (D) for targets (m, K) with a tensor of m × D outputs.

    6 m D d FLOPs forwards and backwards. centred: as for logits.
    """
    o = torch.nn.functional.linear(H, W, b)
    if options.accumulate_dtype == torch.float64:
        o = o.double()
    return logits.statistics(o, target, pi, centred=centred)
