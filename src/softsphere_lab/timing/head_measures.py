"""Heads of language models and recommenders, each measured in every respect."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softsphere_lab.timing.clock import Effort, seconds_of
from softsphere_lab.timing.linear_losses import LOSSES, softmax, through_logits
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.setting import Setting

__all__ = ["BFLOAT16", "OURS", "PRECISIONS", "head_measures"]

# The engines of this library that are measured.
OURS = ("gram", "chunked")
# How a head computes: in bfloat16, or in float32 at one of PyTorch's precisions of its products.
BFLOAT16 = "bfloat16"
PRECISIONS = (BFLOAT16, "highest", "high", "medium")
# How many rows the error of the gradient is taken from.
EXACT_ROWS = 64


def head_measures(
    name: str, setting: Setting, effort: Effort, device: str, precision: str = BFLOAT16
) -> dict[str, float]:
    """Measures forward and backward of one layer, and the same with a step of AdamW.

    name: one of LOSSES. effort: its seconds count the warm-up too, of which long steps have less.
    precision: one of PRECISIONS; that of float32 stays set in this process.
    Returns the numbers by what they measure.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = torch.bfloat16 if precision == BFLOAT16 else torch.float32
    if precision != BFLOAT16:
        torch.set_float32_matmul_precision(precision)
    layer = LOSSES[name]()
    hidden, weight, target = _after_training(setting, device, dtype)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)

    def both_ways() -> None:
        hidden.grad = weight.grad = None
        layer(hidden, weight, target).backward()

    def whole() -> None:
        both_ways()
        optimizer.step()

    both_ways()
    assert hidden.grad is not None
    exact = _exact_gradient(name, hidden, weight, target)
    error = float((hidden.grad[: len(exact)] - exact).norm() / exact.norm())
    hidden.grad = weight.grad = None
    kept = sum(x.numel() * x.element_size() for x in (hidden, weight))
    extra = extra_bytes(both_ways, device) - kept
    seconds = _median(both_ways, effort, device)
    found = {
        "error of the gradient by hidden": error,
        "milliseconds": 1e3 * seconds,
        "milliseconds with AdamW": 1e3 * _median(whole, effort, device),
        "extra MiB": extra / 2**20,
    }
    if name == "gram":
        D, d, m = setting.D, setting.d, setting.m
        W = weight.detach()
        rate = 2 * D * d**2 / _median(lambda: W.mT @ W, effort, device)
        found["share of the product rate"] = 4 * (D + m) * d * d / seconds / rate
    return found


def _median(run: Callable[[], Any], effort: Effort, device: str) -> float:
    times: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(times) < effort.warm_up + effort.most:
        times.append(seconds_of(run, device))
        if len(times) >= 2 * effort.fewest and time.perf_counter() > end:
            break
    return statistics.median(times[min(effort.warm_up, len(times) // 2) :])


def _after_training(
    setting: Setting, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, a weight and targets as they are after training.

    Peers that skip small blocks should see those: each row leans to its target, so that softmax
    gives the target much of its mass, and the rest has a long tail.
    """
    D, d, m = setting.D, setting.d, setting.m
    target = torch.randint(D, (m,), device=device)
    weight = torch.randn(D, d, device=device).div_(math.sqrt(d))
    hidden = torch.randn(m, d, device=device) + 8 * weight[target]
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, target


def _exact_gradient(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The gradient with respect to the first rows, in float64."""
    loss = through_logits if name in OURS else softmax
    rows = hidden.detach()[:EXACT_ROWS].double().requires_grad_()
    loss(rows, weight.detach().double(), target[:EXACT_ROWS]).backward()
    assert rows.grad is not None
    return rows.grad * len(rows) / len(hidden)
