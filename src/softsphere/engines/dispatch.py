"""The list of engines, and the statistics of a linear layer by the engine that options name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softsphere._torch import forward_mode_active, transforms_active
from softsphere.engines.chunked import CHUNKED
from softsphere.engines.dense import DENSE
from softsphere.engines.engine import Engine, Inputs, Settings, Workload
from softsphere.engines.gram import GRAM
from softsphere.engines.weight import sum_dtype
from softsphere.stats import Stats

if TYPE_CHECKING:  # options.py reads the list of engines
    from softsphere.engines.options import LinearSphericalOptions

__all__ = ["ENGINES", "cheapest", "linear_statistics", "settings"]

# Every engine there is. A new one is a line here.
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (DENSE, CHUNKED, GRAM)}


def linear_statistics(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    *,
    centred: bool,
    options: LinearSphericalOptions,
    mass: float | Tensor | None = None,
) -> Stats:
    """The statistics of the outputs H Wᵀ + b by the engine that `options` name or choose.

    Args:
        H: (m, d), the hidden rows.
        W: (D, d), the weight.
        b: (D) or None, the bias.
        target: (m, K), the target classes of each row.
        pi: (D) or None, the base measure; zero for a class that takes no part.
        centred: whether the mean output of each row is taken off all of its outputs. s is then 0,
            and q is a true sum of squares.
        options: which engine, and how it computes.
        mass: M = Σ π_k as the losses see it; None stands for D.

    Returns the statistics in float32 or wider, differentiable with respect to H, W and b.

    Raises RuntimeError if a named engine is used in forward mode or inside a torch.func transform
    that it has no rule for, and what the engine's own check raises.
    """
    x = Inputs(H, W, b, target, pi)
    how = settings(x, options, centred=centred)
    engine = _engine(x, options, centred=centred)
    engine.check(x, how)
    guarded = engine.guarded if options.engine == "auto" else None
    s, q, c = (guarded or engine.statistics)(x, how)
    total = float(W.shape[0]) if mass is None else mass
    return Stats(s, q, c, total, pi=None if pi is None else pi[target])


def settings(x: Inputs, options: LinearSphericalOptions, *, centred: bool) -> Settings:
    """How an engine computes with these tensors under these options."""
    return Settings(
        centred,
        options.row_chunk,
        options.class_chunk,
        sum_dtype(x.H, x.W, options.accumulate_dtype),
        options.deterministic,
    )


def _engine(x: Inputs, options: LinearSphericalOptions, *, centred: bool) -> Engine:
    forward_mode = forward_mode_active()
    # a compiler traces what a transform makes of the operators
    transforms = not torch.compiler.is_compiling() and transforms_active()
    if options.engine != "auto":
        engine = ENGINES[options.engine]
        if (forward_mode or transforms) and not engine.transforms:
            lacking = (
                "forward-mode derivative" if forward_mode else "rule for torch.func transforms"
            )
            raise RuntimeError(
                f"engine={engine.name!r} has no {lacking}; use engine='dense' (or 'auto')"
            )
        return engine
    if forward_mode or transforms:
        return DENSE
    (m, K), (D, d) = x.target.shape, x.W.shape
    work = Workload(m, D, d, K, int(x.b is not None), x.H.dtype, x.H.device.type, centred)
    return ENGINES[cheapest(work)]


def cheapest(work: Workload, engines: Iterable[Engine] | None = None) -> str:
    """The name of the engine that costs least among those that are able to do the work.

    A compiler can trace this with sizes that are not known yet.
    """
    best, least = CHUNKED.name, math.inf
    for engine in ENGINES.values() if engines is None else engines:
        if engine.able(work):
            cost = engine.cost(work)
            if cost < least:
                best, least = engine.name, cost
    return best
