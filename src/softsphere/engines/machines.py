"""What an engine does besides matrix products, in FLOPs that take as long: data of two machines.

On a GPU products are so fast that every pass through memory counts for more of them. Its numbers
follow from the rates of an H100: 650 TFLOP/s in half precision, which is that of a product W A of
(256,000, 2304) in bfloat16 that took 4.0 ms; 50 TFLOP/s in float32 without TF32 and 3 TB/s from
memory, which are taken from its data sheet with a margin; 2 to 4 bytes for a number in a pass, and
60 launches of 5 µs. How well the numbers of a CPU choose on 2 cores is shown by
`benchmarks/engines_by_size.py`, and those of a GPU by `benchmarks/engines_by_size_on_gpu.py`, which
has not been run yet. `benchmarks/machine_numbers.py` finds the numbers that fit such a table best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Machine", "machine"]


@dataclass(frozen=True)
class Machine:
    """FLOPs that take as long as other work.

    output: one entry of H Wᵀ, which is written, summed, and turned into a gradient
    input: one entry of H and of its rows of W at the targets, which are read, multiplied, summed
        and added
    number: one entry of W, which is read for each product and whose gradient is written
    overhead: what does not depend on sizes
    float32: one FLOP of a product of float32 tensors
    logits_limit: the bytes that outputs, their gradient and the float32 tensors made of them may
        take where they are chosen: a small part of any machine's memory
    """

    output: int
    input: int
    number: int
    overhead: float
    logits_limit: int
    float32: int = 1


_CPU = Machine(output=200, input=800, number=0, overhead=5e7, logits_limit=1 << 30)
_GPU_HALF = Machine(
    output=3200, input=6000, number=1600, overhead=2e11, logits_limit=4 << 30, float32=13
)
_GPU_FLOAT = Machine(output=270, input=500, number=130, overhead=1.6e10, logits_limit=4 << 30)


def machine(device: str, dtype: torch.dtype) -> Machine:
    """The data for a kind of device and a dtype."""
    if device != "cuda":
        return _CPU
    return _GPU_HALF if dtype.itemsize == 2 else _GPU_FLOAT
