"""Which engine is chosen for which sizes: a pure function that says why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softsphere import checks
from softsphere.engines.dispatch import ENGINES, cheapest
from softsphere.engines.engine import Workload

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """The name of an engine, and the reason for it.

    Args:
        engine: the name, as `LinearSphericalOptions` takes it.
        reason: a sentence with the estimated costs of all engines.
    """

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
    shift_invariant: bool = False,
) -> Choice:
    """Returns the engine that "auto" takes for these sizes, and why.

    The engine is the cheapest one that is able to do the work. The costs of a step forward and
    backward are counted in FLOPs, with n = d + 1 if there is a bias and n = d otherwise:

        dense     6 m D n + the passes over its outputs; the outputs, their gradient and two float32
                  tensors made of them must fit in 1 GiB, or in 4 GiB on a GPU
        chunked   8 m D n + those passes; in half precision on a GPU 12 m D n, or 8 m D n in float32
                  for a loss that is invariant to a shift of its outputs
        gram      4 D n² + 4 m n² + the passes over its inputs and its weight + its overhead

    What passes, overheads and products in float32 take, in FLOPs that take as long, are data of a
    machine: of 2 cores, and of an H100 for every GPU. Before torch 2.8 chunked and gram multiply in
    float32 on every GPU.

    The choice depends on sizes alone. With S = Σ π (w − w̄)(w − w̄)ᵀ, the gram engine computes
    q = hᵀSh with an error of about 30 eps Σ_j h_j² S_jj, or of about 2⁻¹⁶ Σ_j h_j² S_jj where
    `torch.set_float32_matmul_precision` allows float32 products that are not exact. Where large
    terms cancel, as when some columns of the weight and the bias take each other off, little of q
    may be left. On a CPU, outside of compiled code, "auto" looks at this bound. If it is above
    q / 1000 for some row, the statistics of the batch are computed again with the Gram matrix in
    float64, and by the chunked engine if even that has lost q. This takes three to five times as
    long. On a GPU and in compiled code nothing is looked at, since that would mean waiting for the
    device. If such cancellation is possible there, use accumulate_dtype=torch.float64 or name the
    chunked engine.

    All engines but dense need 6 m K n more for the rows of the weight at the targets. A loss that
    is not spherical, class probabilities and label smoothing need the dense engine whatever this
    function says.

    Args:
        m: number of rows.
        num_classes: D.
        in_features: d.
        dtype: dtype of the rows, a floating-point one.
        device: where the rows are.
        K: number of targets of each row.
        bias: whether the layer has a bias.
        shift_invariant: whether the loss is invariant to a shift of its outputs, as the attribute
            of this name of a loss says.

    Raises TypeError or ValueError for a size or a dtype that cannot be.

    >>> choose(2048, 100_000, 512, torch.float32, "cpu").engine
    'gram'
    >>> choose(8, 1000, 512, torch.float32, "cpu").engine
    'dense'
    """
    checks.sizes(m=m, num_classes=num_classes, in_features=in_features, K=K)
    checks.floating_dtype(dtype)
    kind = torch.device(device).type
    work = Workload(m, num_classes, in_features, K, int(bias), dtype, kind, shift_invariant)
    return _explained(work, cheapest(work))


def _explained(work: Workload, engine: str) -> Choice:
    memory = work.outputs_bytes
    # dense has a cost even where its outputs do not fit
    costs = {x.name: x.cost(work) for x in ENGINES.values() if x.name == "dense" or x.able(work)}
    listed = ", ".join(f"{name} {flops:.2g}" for name, flops in costs.items())
    limit = work.machine.logits_limit
    fits = "" if memory <= limit else f", more than the {limit >> 20} that dense may"
    return Choice(
        engine,
        f"{engine} is the cheapest that fits; estimated costs in FLOP equivalents: {listed}; the "
        f"outputs and the tensors made of them would take {memory / 2**20:.3g} MiB{fits}",
    )
