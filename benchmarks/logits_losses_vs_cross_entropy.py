"""What does a loss on logits cost beside `F.cross_entropy`?

    python benchmarks/logits_losses_vs_cross_entropy.py [--rows 4096] [--classes 50257]

Forward and backward in float32, the losses in turn, compared pair by pair. Extra memory is the peak
of what is allocated beyond the logits and their gradient, in sizes of the logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import softsphere
from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.clock import in_turn, paired_ratio
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.setting import Setting

REFERENCE = "F.cross_entropy"
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    REFERENCE: F.cross_entropy,
    "TaylorSoftmaxLoss()": softsphere.TaylorSoftmaxLoss(),
    "SphericalSoftmaxLoss()": softsphere.SphericalSoftmaxLoss(),
    "SphericalLoss('z_loss')": softsphere.SphericalLoss("z_loss"),
    "SphericalLoss('squared_error')": softsphere.SphericalLoss("squared_error"),
}


def compared(setting: Setting, repeats: int, device: str) -> Iterator[Row]:
    torch.manual_seed(0)
    logits = torch.randn(setting.m, setting.D, device=device, requires_grad=True)
    target = torch.randint(setting.D, (setting.m,), device=device)

    def both_ways(name: str) -> None:
        logits.grad = None
        CRITERIA[name](logits, target).backward()

    runs = {name: partial(both_ways, name) for name in CRITERIA}
    times = in_turn(runs, repeats, device)
    size = logits.numel() * logits.element_size()
    for name, taken in times.items():
        logits.grad = None
        # the gradient of the logits stays, and does not count
        extra = extra_bytes(runs[name], device) / size - 1
        ratio = paired_ratio(taken, times[REFERENCE])
        yield Row(name, setting, f"time over {REFERENCE}", ratio)
        yield Row(name, setting, "extra memory over logits", extra)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, default=4096)
    parser.add_argument("--classes", type=positive, default=50257)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def cases(options: argparse.Namespace) -> list[Case]:
    m, D = (16, 500) if options.smoke else (options.rows, options.classes)
    # outputs have no width
    setting = Setting(D=D, d=0, m=m)
    return [Case(str(setting), partial(compared, setting, options.repeats, options.device))]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases, add_options))
