"""How long do heads of language models and of a recommender take on a GPU, against their peers?

    python benchmarks/language_model_heads_on_gpu.py --head "Gemma-2 2B"

Forward and backward, and the same with a step of AdamW: medians of 30 after 8, or of what fits in
eight seconds. Each layer has a process of its own, and is left out if it fails or takes more than a
minute. Without --head all heads are measured. They are in bfloat16, or with --precision in float32
at that precision. A command that is stopped leaves a table of what it has measured, and goes on
with --resume --out FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import Case, Row, left_out, run
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.head_measures import BFLOAT16, OURS, PRECISIONS
from softsphere_lab.timing.linear_losses import GPU_SOFTMAX, version_of
from softsphere_lab.timing.processes import measure_head
from softsphere_lab.timing.setting import Setting

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
PATIENCE = 120.0  # the compiler begins with an empty cache
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compared(
    label: str, name: str, setting: Setting, effort: Effort, device: str, precision: str
) -> Iterator[Row]:
    how = {"device": device, "precision": precision}
    try:
        found = measure_head(name, setting, effort, **how, patience=PATIENCE)
    except LabError as error:  # out of memory, not installed, or too slow
        yield left_out(label, setting, error)
        return
    for measure, value in found.items():
        yield Row(label, setting, measure, value)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", choices=HEADS, help="measure this head alone")
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
        (TINY, Effort(0.0, 1, 1, 2)) if options.smoke else (HEADS, Effort(8.0, 8, 3, 30))
    )
    precision = options.precision
    at = "" if precision == BFLOAT16 else f", float32 {precision}"
    return [
        Case(
            f"{head}{at}, {setting}: {name}",
            partial(
                compared,
                f"{head}{at}: {name}{version_of(name)}",
                name,
                setting,
                effort,
                DEVICE,
                precision,
            ),
        )
        for head, setting in heads.items()
        if options.head in (None, head)
        for name in (*OURS, *GPU_SOFTMAX)
    ]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases, add_options, device=DEVICE))
