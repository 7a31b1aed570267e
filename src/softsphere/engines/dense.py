"""The engine "dense": (s, q, c) of H Wᵀ + b from the outputs themselves, the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.engines.engine import Engine, Inputs, Settings, Workload, mass_of
from softsphere.engines.row_statistics import output_statistics
from softsphere.engines.weight import spread_of_outputs, sum_dtype
from softsphere.rounding import above_rounding

__all__ = ["DENSE"]


def _statistics_of_outputs(x: Inputs, how: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """s, q and c, with a tensor of m × D outputs in the dtype of H."""
    o = torch.nn.functional.linear(x.H, x.W, x.b)
    if how.dtype == torch.float64:
        o = o.double()
    found = output_statistics(o, x.target, x.pi, centred=how.centred)
    if not how.centred:
        return found.s, found.q, found.c
    # The outputs have the digits of their own dtype, even if they are summed in a wider one.
    apart = spread_of_outputs(x, sum_dtype(x.H, x.W, torch.float32))
    q = above_rounding(found.q, apart, mass_of(x.pi, x.W.shape[0]))
    return found.s, q, found.c


def _cost(work: Workload) -> float:
    return 6 * work.m * work.D * work.n + work.passes


def _fits(work: Workload) -> bool:
    return work.outputs_bytes <= work.machine.logits_limit


DENSE = Engine("dense", _statistics_of_outputs, _cost, able=_fits, transforms=True)
