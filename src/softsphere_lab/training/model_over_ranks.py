"""A network and its output layer on the ranks of a process group, with the numbers of one process.

Each rank has its share of the rows of a batch. The classes of the output layer are sharded over the
ranks, unless it is a layer without a process group, which every rank then has as a whole.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softsphere.parallel import Batch, clip_grad_norm_, leave_out_of_ddp, sum_of_losses
from softsphere.parallel import Ranks as Group
from softsphere_lab.models.baselines import AdaptiveSoftmax
from softsphere_lab.models.output_layers import Ranks
from softsphere_lab.training.whole_model import WholeModel

__all__ = ["ModelOverRanks"]

# The target of a row that does not count.
IGNORED = -100


class ModelOverRanks(WholeModel):
    """A network and its output layer on several processes, all of which make the same calls.

    Every rank gives the whole batch to `loss` and `rank`, which return the same on all ranks, and
    computes with its share of the rows. All ranks must begin with the same weights and with the
    same state of the random generator.
    """

    def __init__(self, network: nn.Module, head: nn.Module, group: dist.ProcessGroup) -> None:
        self.group = Group(group)
        self.share = _Share(self.group)
        super().__init__(_with_dropout_of_all(network, self.share), head)
        self.sharded = getattr(head, "shards", None) is not None
        self.both = leave_out_of_ddp(_Both(self.network, head))
        self.trained = DistributedDataParallel(
            self.both,
            process_group=group,
            # the words of one rank may leave out a cluster of adaptive softmax
            find_unused_parameters=isinstance(head, AdaptiveSoftmax),
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        own, counts = self.share.of_batch(len(x)), self.share.counts
        counted = counts[self.group.rank]
        target = y[own] if counted or not self.sharded else torch.full_like(y[own], IGNORED)
        model = self.trained if torch.is_grad_enabled() else self.both
        loss: Tensor = model(x[own], target)
        if self.sharded:
            return loss
        part = loss * (counted / len(x))
        if part.requires_grad:
            size = self.group.size  # DistributedDataParallel averages, where a sum is needed
            part.register_hook(lambda g: g * size)
        return sum_of_losses(part, Batch(self.group, counts))

    def rank(self, x: Tensor, y: Tensor) -> Tensor:
        own, counts = self.share.of_batch(len(x)), self.share.counts
        words = y[0].numel()
        found = cast(Ranks, self.head).rank(self.network(x[own]), y[own]).flatten()
        batch = Batch(self.group, tuple(words * count for count in counts))
        return batch.gathered(found[: words * counts[self.group.rank]])

    def clip(self, most: float) -> None:
        clip_grad_norm_(self.both, most)

    def whole(self, state: Any) -> Any:
        if hasattr(state, "full_tensor"):  # a DTensor, whose module takes long to import
            return state.full_tensor()
        if isinstance(state, dict):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, (list, tuple)):
            return type(state)(self.whole(value) for value in state)
        return state


class _Both(nn.Module):
    """A network and its output layer as one module, as DistributedDataParallel needs it."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.head(self.network(x), y)
        return loss


class _Share:
    """Which rows of a batch are those of this rank: consecutive ones, in the order of the ranks.

    counts: the number of rows of each rank, which differ by at most one. own: the rows of this
    rank. A rank without rows computes with the first row of the batch, which does not count there.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.counts: tuple[int, ...] = ()
        self.own = slice(0, 0)
        self.total = 0

    def of_batch(self, rows: int) -> slice:
        """Returns the rows of this rank in a batch of that many rows, and remembers both."""
        size, rank = self.group.size, self.group.rank
        starts = [rows * i // size for i in range(size + 1)]
        self.counts = tuple(starts[i + 1] - starts[i] for i in range(size))
        self.own = slice(starts[rank], starts[rank + 1]) if self.counts[rank] else slice(0, 1)
        self.total = rows
        return self.own


class _DropoutOfAll(nn.Module):
    """Dropout that draws for the rows of all ranks, so that each row has what one process draws."""

    def __init__(self, p: float, share: _Share) -> None:
        super().__init__()
        self.p, self.share = p, share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        ones = x.new_ones(self.share.total, *x.shape[1:])
        return x * F.dropout(ones, self.p)[self.share.own]


def _with_dropout_of_all(network: nn.Module, share: _Share) -> nn.Module:
    """Returns the network, each nn.Dropout of which draws for the rows of all ranks."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(module, name, _DropoutOfAll(child.p, share))
    return network
