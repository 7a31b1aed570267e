"""How long do heads of language models and of a recommender take on a GPU, against their peers?

    python benchmarks/language_model_heads_on_gpu.py --out runs/heads --resume

Forward and backward as Python runs them and captured as a CUDA graph, the same with a step of
AdamW, the memory, and the errors of both gradients: medians of 20 calls after 4, or of what fits in
two and a half seconds. Each layer has a process of its own, which is ended after 80 seconds; what
it had measured by then stays. A peer that is not installed is left out at once, and looked for
again by --resume.

The heads are in bfloat16, or with --precision in float32 at that precision. Without --head all are
measured; heads that are measured one by one share a folder by --resume --out FOLDER, which begins
it where there is none. No layer is begun after --minutes, so that a command takes less than eight;
the same line measures what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import Case, Row, left_out, reason_of, run
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.head_measures import BFLOAT16, OURS, PRECISIONS, measures_of
from softsphere_lab.timing.head_ratios import IN_FLOAT32, fastest_exact_softmax, label
from softsphere_lab.timing.processes import measure_head
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.softmax_peers import GPU_SOFTMAX

HEADS = {
    "Gemma-2 2B": Setting(m=8192, D=256_000, d=2304),
    "Qwen-size": Setting(m=16384, D=248_320, d=2048),
    "Llama-3-8B": Setting(m=32768, D=128_256, d=4096),
    # with so few rows the Gram matrix should not pay
    "Llama-3-8B, 1024 rows": Setting(m=1024, D=128_256, d=4096),
    "Llama-3-8B, 4096 rows": Setting(m=4096, D=128_256, d=4096),
    "GPT-2 small": Setting(m=16384, D=50_304, d=768),
    "recommendation": Setting(m=25600, D=1_000_000, d=128),
}
TINY = {"tiny": Setting(m=256, D=1000, d=64)}
# Seconds of a process; the compiler begins with an empty cache.
PATIENCE = 80.0
# With the last process the whole command takes less than eight.
MINUTES = 6.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compared(
    head: str, name: str, setting: Setting, effort: Effort, device: str, precision: str
) -> Iterator[Row]:
    layer = label(head, name)
    missing = GPU_SOFTMAX[name].missing() if name in GPU_SOFTMAX else None
    if missing:
        yield left_out(layer, setting, missing, again=True)
        return
    measures = measures_of(name, device)
    remaining = list(measures)
    try:
        how = {"device": device, "precision": precision}
        for measure, value in measure_head(name, setting, effort, **how, patience=PATIENCE):
            remaining.remove(measure)
            if isinstance(value, str):
                yield left_out(layer, setting, f"{measure}: {value}")
            else:
                yield Row(layer, setting, measure, value)
    except LabError as error:  # out of memory, or too slow
        what = f"{', '.join(remaining)}: " if len(remaining) < len(measures) else ""
        if remaining:  # it may fail when it has measured all and leaves
            yield left_out(layer, setting, what + reason_of(error))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(minutes=MINUTES)
    parser.add_argument(
        "--head", choices=HEADS, action="append", help="measure this head; may be repeated"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=BFLOAT16,
        help="bfloat16, or float32 at this precision of its products (default: bfloat16)",
    )


def cases(options: argparse.Namespace) -> list[Case]:
    if DEVICE == "cpu" and not options.smoke:
        raise LabError("this benchmark needs a CUDA device, and PyTorch sees none")
    heads, effort = (
        (TINY, Effort(0.0, 1, 1, 2)) if options.smoke else (HEADS, Effort(2.5, 4, 3, 20))
    )
    # a list, also in the record, which has the heads of all starts
    options.head = list(heads) if options.head is None or options.smoke else options.head
    precision = options.precision
    at = "" if precision == BFLOAT16 else f"{IN_FLOAT32}{precision}"
    return [
        Case(
            f"{head}{at}, {setting}: {name}",
            partial(compared, f"{head}{at}", name, setting, effort, DEVICE, precision),
        )
        for head, setting in heads.items()
        if head in options.head
        for name in (*OURS, *GPU_SOFTMAX)
    ]


if __name__ == "__main__":
    sys.exit(
        run(
            __file__,
            __doc__,
            cases,
            add_options,
            device=DEVICE,
            derived=fastest_exact_softmax,
            grows=("head",),
        )
    )
