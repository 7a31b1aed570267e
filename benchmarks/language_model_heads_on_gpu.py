"""How long do heads of language models and of a recommender take on a GPU, against their peers?

    python benchmarks/language_model_heads_on_gpu.py

Forward and backward in bfloat16: the median of 30 after 8; with a step of AdamW, of 10 after 8.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import Case, Row, left_out, run
from softsphere_lab.timing.clock import seconds_of
from softsphere_lab.timing.linear_losses import (
    GPU_SOFTMAX,
    LOSSES,
    softmax,
    through_logits,
)
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.setting import Setting

HEADS = {
    "Gemma-2 2B": Setting(m=8192, D=256_000, d=2304),
    "Qwen-size": Setting(m=16384, D=248_320, d=2048),
    "Llama-3-8B": Setting(m=32768, D=128_256, d=4096),
    "GPT-2 small": Setting(m=16384, D=50_304, d=768),
    "recommendation": Setting(m=25600, D=1_000_000, d=128),
}
OURS = ("gram", "chunked")


def median_of(run: Callable[[], Any], repeats: int, warm_up: int) -> float:
    return statistics.median([seconds_of(run, "cuda") for _ in range(warm_up + repeats)][warm_up:])


def compared(head: str, name: str, setting: Setting) -> Iterator[Row]:
    label = f"{head}: {name}"
    try:
        yield from timed(label, name, setting)
    except (RuntimeError, ImportError) as error:  # out of memory, or not installed
        yield left_out(label, setting, type(error).__name__)
    finally:
        torch.cuda.empty_cache()


def timed(label: str, name: str, setting: Setting) -> Iterator[Row]:
    layer = LOSSES[name]()
    hidden, weight, target = trained(setting)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)

    def both_ways() -> None:
        hidden.grad = weight.grad = None
        layer(hidden, weight, target).backward()

    def whole() -> None:
        both_ways()
        optimizer.step()

    both_ways()
    exact = exact_gradient(name, hidden, weight, target)
    error = float((hidden.grad[: len(exact)] - exact).norm() / exact.norm())
    yield Row(label, setting, "error of the gradient by hidden", error)
    hidden.grad = weight.grad = None
    kept = 2 * (hidden.numel() + weight.numel())
    extra = extra_bytes(both_ways, "cuda") - kept
    seconds = median_of(both_ways, 30, 8)
    yield Row(label, setting, "milliseconds", 1e3 * seconds)
    yield Row(label, setting, "milliseconds with AdamW", 1e3 * median_of(whole, 10, 8))
    yield Row(label, setting, "extra MiB", extra / 2**20)
    if name == "gram":
        D, d, m = setting.D, setting.d, setting.m
        W = weight.detach()
        product = median_of(lambda: W.mT @ W, 15, 5)
        rate = 2 * D * d**2 / product
        share = 4 * (D + m) * d * d / seconds / rate
        yield Row(label, setting, "share of the product rate", share)


def trained(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, a weight and targets as they are after training.

    Peers that skip small blocks should see those: each row leans to its target, so that softmax
    gives the target much of its mass, and the rest has a long tail.
    """
    torch.manual_seed(0)
    target = torch.randint(setting.D, (setting.m,), device="cuda")
    weight = torch.randn(setting.D, setting.d, device="cuda").div_(math.sqrt(setting.d))
    hidden = torch.randn(setting.m, setting.d, device="cuda") + 8 * weight[target]
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    return hidden, weight, target


def exact_gradient(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The gradient with respect to the first 64 rows, in float64."""
    loss = through_logits if name in OURS else softmax
    rows = hidden.detach()[:64].double().requires_grad_()
    loss(rows, weight.detach().double(), target[:64]).backward()
    return rows.grad * len(rows) / len(hidden)


def cases(options: argparse.Namespace) -> list[Case]:
    if not torch.cuda.is_available():
        raise LabError("this benchmark needs a CUDA device, and PyTorch sees none")
    heads = {"tiny": Setting(m=256, D=1000, d=64)} if options.smoke else HEADS
    return [
        Case(f"{head}, {setting}: {name}", partial(compared, head, name, setting))
        for head, setting in heads.items()
        for name in (*OURS, *GPU_SOFTMAX)
    ]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
