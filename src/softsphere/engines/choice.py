"""Which engine: a pure function that can be asked, and says why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from softsphere import checks

__all__ = ["TRITON", "Choice", "cheapest", "choose"]

# What outputs may take, their gradient and what is made of them in float32 on the way among it: a
# small part of any machine's memory.
LOGITS_LIMIT = 1 << 30
# What one output costs besides its products, in FLOPs: it is written, summed, and turned into a
# gradient, each time through memory.
FLOPS_PER_OUTPUT = 200
# The same of an input by the gram engine, whose products have few of them: target rows are read,
# multiplied, summed and added.
FLOPS_PER_INPUT = 800
# FLOPs of a step that are done in the time of the gram engine's own overhead.
GRAM_OVERHEAD = 5e7

TRITON = find_spec("triton") is not None


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
        gram      4 D n² + 4 m n² + the passes over its inputs + its overhead

    and 6 m K n more for the rows of the targets in all but dense. What is not spherical, and class
    probabilities and label smoothing, can do with dense alone, and are not asked about here.

    >>> choose(2048, 100_000, 512, torch.float32, "cpu").engine
    'gram'
    >>> choose(8, 1000, 512, torch.float32, "cpu").engine
    'dense'
    """
    checks.sizes(m=m, num_classes=num_classes, in_features=in_features, K=K)
    checks.floating_dtype(dtype)
    use_triton = TRITON if triton is None else triton
    sizes = m, num_classes, in_features, dtype, torch.device(device).type, K, bias, use_triton
    engine, cost, memory = cheapest(*sizes), costs(*sizes), logits_bytes(m, num_classes, dtype)
    fits = "" if memory <= LOGITS_LIMIT else f", more than the {LOGITS_LIMIT >> 20} that dense may"
    listed = ", ".join(f"{name} {flops:.2g}" for name, flops in cost.items())
    return Choice(
        engine,
        f"{engine} is the cheapest that fits; FLOPs, or as long: {listed}; the outputs and what is "
        f"made of them would take {memory / 2**20:.3g} MiB{fits}",
    )


def costs(
    m: int, D: int, d: int, dtype: torch.dtype, device: str, K: int, bias: bool, triton: bool
) -> dict[str, float]:
    """FLOPs of a step by each engine, or as long as so many would take."""
    n = d + bias
    passes, rows = FLOPS_PER_OUTPUT * m * D, 6 * m * K * n
    found = {
        "dense": 6 * m * D * n + passes,
        "gram": 4 * (D + m) * n * n + rows + FLOPS_PER_INPUT * m * n + GRAM_OVERHEAD,
        "chunked": 8 * m * D * n + passes + rows,
    }
    if device == "cuda" and triton:
        found["triton"] = 8 * m * D * n + rows
    return found


def logits_bytes(m: int, D: int, dtype: torch.dtype) -> int:
    """Outputs and their gradient, and two tensors of float32 or wider that the passes make."""
    return m * D * (2 * dtype.itemsize + 2 * max(dtype.itemsize, 4))


def cheapest(
    m: int, D: int, d: int, dtype: torch.dtype, device: str, K: int, bias: bool, triton: bool
) -> str:
    """The engine alone, in words that a compiler can trace with sizes that are not known yet."""
    best, least = "chunked", math.inf
    for name, cost in costs(m, D, d, dtype, device, K, bias, triton).items():
        able = name != "dense" or logits_bytes(m, D, dtype) <= LOGITS_LIMIT
        if able and cost < least:
            best, least = name, cost
    return best
