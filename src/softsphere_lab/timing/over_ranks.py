"""Training steps of output layers whose classes are sharded over processes of this machine."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.multiprocessing.spawn import spawn

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
)
from softsphere.optim import FactoredSGD
from softsphere.parallel import count_traffic
from softsphere_lab.timing.clock import Effort, step_times
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.sharded_steps import (
    CLUSTERED,
    FACTORED,
    GRAM,
    SOFTMAX,
    number_of_clusters,
)
from softsphere_lab.timing.steps import Step
from softsphere_lab.timing.training_steps import LOSS, RATE

__all__ = ["ON_RANKS", "measured_on_ranks", "vocabulary_parallel_softmax"]


def _gram(setting: Setting) -> Step:
    head = LinearSphericalLoss(
        setting.d,
        setting.D,
        LOSS,
        bias=False,
        options=LinearSphericalOptions(engine="gram"),
        process_group=dist.group.WORLD,
    )
    return Step(head, torch.optim.SGD(head.parameters(), lr=1e-3 * setting.D))


def _factored(setting: Setting) -> Step:
    head = FactoredSphericalLoss(
        setting.d, setting.D, LOSS, bias=False, process_group=dist.group.WORLD
    )
    return Step(head, FactoredSGD(head.parameters(), lr=1e-3 * setting.D))


def _clustered(setting: Setting) -> Step:
    C = number_of_clusters(setting)
    # common classes are spread over the clusters
    head = ClusteredLoss(
        setting.d,
        setting.D,
        torch.arange(setting.D) % C,
        leaf=LOSS,
        bias=False,
        sparse=True,
        process_group=dist.group.WORLD,
    )
    return Step(head, torch.optim.SGD(head.parameters(), lr=RATE))


class ParallelSoftmax(nn.Module):
    """PyTorch's `loss_parallel` on logits that are sharded by class, from rows that are as well."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        plan = ColwiseParallel(
            input_layouts=Shard(0), output_layouts=Shard(-1), use_local_output=False
        )
        with torch.device("meta"):
            linear = nn.Linear(setting.d, setting.D, bias=False)
        # each rank makes its own rows, where D × d numbers would not fit
        self.linear = parallelize_module(linear, self.mesh, plan).to_empty(device="cpu")
        bound = 1 / math.sqrt(setting.d)
        weight = self.linear.weight
        assert isinstance(weight, DTensor)
        with torch.no_grad():
            weight.to_local().uniform_(-bound, bound)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of the rows of all ranks. To be called within `loss_parallel`."""
        own = DTensor.from_local(target, self.mesh, [Shard(0)], run_check=False)
        return F.cross_entropy(self.linear(hidden), own.redistribute(self.mesh, [Replicate()]))


def vocabulary_parallel_softmax(setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of softmax over classes that are sharded over the ranks."""
    head = ParallelSoftmax(setting)
    step = Step(head, torch.optim.SGD(head.parameters(), lr=RATE))

    def within(hidden: Tensor, target: Tensor) -> Tensor:
        with loss_parallel():
            loss = step(hidden, target)
        assert isinstance(loss, DTensor)
        return loss.full_tensor()  # which waits for its last sum

    return within


ON_RANKS: Mapping[str, Callable[[Setting], Callable[[Tensor, Tensor], Tensor]]] = {
    GRAM: _gram,
    FACTORED: _factored,
    CLUSTERED: _clustered,
    SOFTMAX: vocabulary_parallel_softmax,
}


@dataclass(frozen=True)
class _Job:
    name: str
    setting: Setting
    effort: Effort
    ranks: int
    folder: str


def measured_on_ranks(
    name: str, setting: Setting, effort: Effort, ranks: int
) -> dict[str, float | None]:
    """Times a layer on processes of one thread each; setting.m counts the rows of all of them.

    Of effort the numbers of steps count, not the seconds, since all ranks take the same steps.
    Returns the median of the seconds of a step, in each of which the slowest rank counts, and the
    messages of the last step and the bytes that a rank gave to them, None for softmax.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(name, setting, effort, ranks, folder)
        spawn(_work, (job,), nprocs=ranks)
        found: dict[str, float | None] = torch.load(Path(folder) / "found")
    return found


def _work(rank: int, job: _Job) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{job.folder}/init", rank=rank, world_size=job.ranks
    )
    s, effort = job.setting, job.effort
    step = ON_RANKS[job.name](s)
    rows = Setting(s.D, s.d, s.m // job.ranks)
    traffic: Any = None

    def together(hidden: Tensor, target: Tensor) -> None:
        nonlocal traffic
        with count_traffic() as traffic:
            step(hidden, target)

    alike = Effort(0.0, effort.warm_up, effort.most)
    times = torch.tensor(step_times(together, rows, alike))
    dist.all_reduce(times, dist.ReduceOp.MAX)
    ours = job.name != SOFTMAX
    found = {
        "seconds": statistics.median(times.tolist()),
        "messages": traffic.messages if ours else None,
        "bytes": traffic.bytes if ours else None,
    }
    if rank == 0:
        torch.save(found, Path(job.folder) / "found")
    dist.barrier()
    dist.destroy_process_group()
