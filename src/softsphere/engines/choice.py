"""Which engine: a pure function that can be asked, and says why."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

__all__ = ["Choice", "choose"]

# Outputs up to this many bytes, their gradient among them, may be made: a small part of any
# machine's memory.
LOGITS_LIMIT = 512 << 20
# What one output costs besides its products, in FLOPs: it is written, summed, and turned into a
# gradient, each time through memory.
FLOPS_PER_OUTPUT = 200
# FLOPs of a step that are done in the time of the gram engine's own overhead.
GRAM_OVERHEAD = 5e7
# How long the products of an engine take beside plain ones of the same FLOPs.
SLOWNESS = {"dense": 1.0, "chunked": 1.0, "gram": 1.0, "triton": 1.0}

TRITON = all(find_spec(name) for name in ("triton", "softsphere.engines.triton"))


@dataclass(frozen=True)
class Choice:
    """An engine's name, and why it."""

    engine: str
    reason: str


def choose(
    m: int,
    num_classes: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    K: int = 1,
    bias: bool = False,
    triton: bool | None = None,
) -> Choice:
    """The engine for m rows of K targets and a weight (D, d): the cheapest that fits, and why.

    FLOPs forwards and backwards, with n = d + 1 for a bias:

        dense     6 m D n + the passes over its outputs, if they fit in LOGITS_LIMIT
        chunked   8 m D n + those passes
        triton    8 m D n, on a GPU where triton is (`triton`; None: as installed)
        gram      4 D n² + 4 m n² + its overhead

    and 6 m K n more for the rows of the targets in all but dense. What is not spherical, and class
    probabilities and label smoothing, can do with dense alone, and are not asked about here.

    >>> choose(2048, 100_000, 512, torch.float32, "cpu").engine
    'gram'
    >>> choose(8, 1000, 512, torch.float32, "cpu").engine
    'dense'
    """
    D, n = num_classes, in_features + bias
    on_gpu = torch.device(device).type == "cuda"
    passes, rows = FLOPS_PER_OUTPUT * m * D, 6 * m * K * n
    costs = {
        "dense": 6 * m * D * n + passes,
        "gram": 4 * (D + m) * n * n + rows + GRAM_OVERHEAD,
        "chunked": 8 * m * D * n + passes + rows,
    }
    if on_gpu and (TRITON if triton is None else triton):
        costs["triton"] = 8 * m * D * n + rows
    costs = {name: cost * SLOWNESS[name] for name, cost in costs.items()}
    memory = 2 * m * D * dtype.itemsize
    able = [name for name in costs if name != "dense" or memory <= LOGITS_LIMIT]
    engine = min(able, key=costs.__getitem__)
    listed = ", ".join(f"{name} {cost:.2g}" for name, cost in costs.items())
    return Choice(
        engine,
        f"FLOPs, or as long: {listed}; the outputs and their gradient would take "
        f"{memory / 2**20:.3g} MiB of at most {LOGITS_LIMIT / 2**20:.3g}",
    )
