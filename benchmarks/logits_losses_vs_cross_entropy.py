"""What does a loss on logits cost beside `F.cross_entropy`?

    python benchmarks/logits_losses_vs_cross_entropy.py [--rows 4096] [--classes 50257]
    python benchmarks/logits_losses_vs_cross_entropy.py --device cuda

Forward and backward in float32, the losses in turn, compared pair by pair. Extra memory is the peak
of what is allocated beyond the logits and their gradient, in sizes of the logits.

On a GPU three sizes are measured in bfloat16 and in float32, each loss as it is and compiled, with
its milliseconds, and compared with the faster `F.cross_entropy` as well. A loss that raises an
error is left out. A command that is stopped goes on with --resume --out FOLDER.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import softsphere
from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import Case, Row, left_out, run
from softsphere_lab.timing.clock import in_turn, paired_ratio
from softsphere_lab.timing.failures import check_device, in_turn_but, reason
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.setting import Setting

Criterion = Callable[[Tensor, Tensor], Tensor]

REFERENCE = "F.cross_entropy"
CRITERIA: dict[str, Criterion] = {
    REFERENCE: F.cross_entropy,
    "TaylorSoftmaxLoss()": softsphere.TaylorSoftmaxLoss(),
    "SphericalSoftmaxLoss()": softsphere.SphericalSoftmaxLoss(),
    "SphericalLoss('z_loss')": softsphere.SphericalLoss("z_loss"),
    "SphericalLoss('squared_error')": softsphere.SphericalLoss("squared_error"),
}
COMPILED = f"{REFERENCE}, compiled"
# outputs have no width
ON_GPU = tuple(Setting(D=D, d=0, m=m) for m, D in ((8192, 50257), (4096, 128256), (4096, 256000)))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of eight; the compiler is asked for every loss at each size, also at the last one that is begun.
MINUTES_ON_GPU = 6.0


class Contest:
    """Forward and backward of losses, on the same logits."""

    def __init__(
        self,
        setting: Setting,
        criteria: Mapping[str, Criterion],
        device: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        shape, self.device = (setting.m, setting.D), device
        self.logits = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        self.target = torch.randint(setting.D, (setting.m,), device=device)
        self.runs = {name: partial(self._both_ways, each) for name, each in criteria.items()}

    def _both_ways(self, criterion: Criterion) -> None:
        self.logits.grad = None
        criterion(self.logits, self.target).backward()

    def extra(self, name: str) -> float:
        """The extra memory of a loss, in sizes of the logits."""
        self.logits.grad = None
        # the gradient of the logits stays, and does not count
        return extra_bytes(self.runs[name], self.device) / self.logits.nbytes - 1


def compared(setting: Setting, repeats: int, device: str) -> Iterator[Row]:
    contest = Contest(setting, CRITERIA, device)
    times = in_turn(contest.runs, repeats, device)
    for name, taken in times.items():
        ratio = paired_ratio(taken, times[REFERENCE])
        yield Row(name, setting, f"time over {REFERENCE}", ratio)
        yield Row(name, setting, "extra memory over logits", contest.extra(name))


def compiled(criterion: Criterion) -> Criterion:
    """Compiled as part of a program, and for one size alone, which is the fastest."""
    return torch.compile(lambda logits, target: criterion(logits, target), dynamic=False)


def compared_on_gpu(setting: Setting, repeats: int, device: str, dtype: str) -> Iterator[Row]:
    # what was compiled for other sizes would count as many recompilations, which have a limit
    torch.compiler.reset()
    criteria = CRITERIA | {f"{name}, compiled": compiled(each) for name, each in CRITERIA.items()}
    contest = Contest(setting, criteria, device, DTYPES[dtype])
    times, failed = in_turn_but(contest.runs, repeats, device)
    for name, error in failed.items():
        yield left_out(f"{dtype}: {name}", setting, reason(error))
    check_device(failed.values(), device)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    rivals = [name for name in (REFERENCE, COMPILED) if name in median]
    against = {f"time over {REFERENCE}": REFERENCE} if REFERENCE in median else {}
    if rivals:
        against[f"time over the faster {REFERENCE}"] = min(rivals, key=median.__getitem__)
    for name, taken in times.items():
        layer = f"{dtype}: {name}"
        yield Row(layer, setting, "milliseconds", 1e3 * median[name])
        for measure, rival in against.items():
            yield Row(layer, setting, measure, paired_ratio(taken, times[rival]))
        yield Row(layer, setting, "extra memory over logits", contest.extra(name))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=positive, help="4096, or those of the three sizes on a GPU")
    parser.add_argument("--classes", type=positive, help="50257, or likewise")
    parser.add_argument("--repeats", type=positive, help="7, or 30 on a GPU")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def cases(options: argparse.Namespace) -> list[Case]:
    device = options.device
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise LabError(f"--device {device} is a CUDA device, and PyTorch sees none")
    if on_gpu and options.minutes is None:
        options.minutes = MINUTES_ON_GPU
    m, D = (16, 500) if options.smoke else (options.rows or 4096, options.classes or 50257)
    one = Setting(D=D, d=0, m=m)
    if not on_gpu:
        return [Case(str(one), partial(compared, one, options.repeats or 7, device))]
    asked = options.smoke or options.rows or options.classes
    return [
        Case(
            f"{dtype}, {setting}",
            partial(compared_on_gpu, setting, options.repeats or 30, device, dtype),
        )
        for setting in ((one,) if asked else ON_GPU)
        for dtype in DTYPES
    ]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases, add_options))
