"""What does a loss on logits cost beside `F.cross_entropy`? Prints ratios of one run.

    python benchmarks/logits.py [--rows 4096] [--classes 50257] [--repeats 7] [--out CSV]

Times are of forward and backward, taken in turn, and compared pair by pair. Extra memory is the
peak of what was allocated beyond the logits and their gradient, counted from the allocator's own
events (CPU) or its statistics (CUDA).
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import extra_bytes, seconds

import softsphere

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CRITERIA: dict[str, Criterion] = {
    "F.cross_entropy": F.cross_entropy,
    "TaylorSoftmaxLoss()": softsphere.TaylorSoftmaxLoss(),
    "SphericalSoftmaxLoss()": softsphere.SphericalSoftmaxLoss(),
    "SphericalLoss('z_loss')": softsphere.SphericalLoss("z_loss"),
    "SphericalLoss('squared_error')": softsphere.SphericalLoss("squared_error"),
}


def run(criterion: Criterion, logits: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def both() -> None:
        logits.grad = None
        criterion(logits, target).backward()

    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the table as CSV")
    options = parser.parse_args()

    torch.manual_seed(0)
    shape = (options.rows, options.classes)
    logits = torch.randn(shape, device=options.device, requires_grad=True)
    target = torch.randint(options.classes, shape[:1], device=options.device)
    runs = {name: run(criterion, logits, target) for name, criterion in CRITERIA.items()}
    for both in runs.values():
        both()
    times: dict[str, list[float]] = {name: [] for name in CRITERIA}
    for _ in range(options.repeats):
        for name, both in runs.items():
            times[name].append(seconds(both, options.device))
    base = times["F.cross_entropy"]
    extra = {}
    for name, both in runs.items():
        logits.grad = None
        extra[name] = extra_bytes(both, options.device)
    size = logits.numel() * logits.element_size()
    device = torch.cuda.get_device_name() if logits.is_cuda else platform.machine()
    rows = [
        {
            "criterion": name,
            "rows": options.rows,
            "classes": options.classes,
            "dtype": "float32",
            "time over F.cross_entropy": round(
                statistics.median(a / b for a, b in zip(taken, base, strict=True)), 3
            ),
            # beyond the gradient, which stays
            "extra memory over logits": round(extra[name] / size - 1, 3),
            "device": device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        for name, taken in times.items()
    ]
    columns = ("criterion", "time over F.cross_entropy", "extra memory over logits")
    print(f"{options.rows} x {options.classes} float32, forward + backward, {device}")
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print(f"{row[columns[0]]:<32}{row[columns[1]]:>28}{row[columns[2]]:>28}")
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
