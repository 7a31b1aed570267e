"""What a layer with a process group knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softsphere._torch import (
    backward_is_running,
    data_parallel_in_forward,
    ignore_in_data_parallel,
    ignored_in_data_parallel,
    is_dtensor,
)
from softsphere.parallel.agreement import Agreement
from softsphere.parallel.batch import Batch
from softsphere.parallel.ranks import Ranks
from softsphere.parallel.sharding import Sharding

__all__ = ["Shards", "checksum", "leave_out_of_ddp", "rows_of_one_rank"]

# Numbers of a checksum that are in memory at once, and integers of their sizes in bytes.
_PART = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Facts of an agreement with these names say whether a rank has stepped a weight, and which rows of
# it the rank has.
_STEPPED, _ROWS = "stepped_", "rows_of_weight_"
# How many rows of a weight stand for all in a comparison of ranks.
_SAMPLE = 64


class Shards:
    """The classes of a layer over the ranks of a process group.

    Args:
        ranks: of the process group.
        num_classes: D.
        replicated: whether all ranks give the layer the same rows.
        averaged: whether the layers below average their gradients over the ranks. None asks the
            DistributedDataParallel whose forward is running; without one, hidden must be a leaf.
    """

    def __init__(
        self, ranks: Ranks, num_classes: int, replicated: bool, averaged: bool | None
    ) -> None:
        self.ranks = ranks
        self.sharding = Sharding(num_classes, ranks.size, ranks.rank)
        self.replicated, self.averaged = replicated, averaged
        # versions of the weights at the last call that the ranks agreed on, and now
        self._seen: tuple[Any, ...] = ()
        self._now: tuple[Any, ...] = ()
        # whether a DistributedDataParallel has run the layer
        self._wrapped = False
        # whether the ranks were seen to have rows of their own
        self._apart = False

        # a number that the ranks gave this layer when they made it; see `making`
        self.layer: int | None = None

    def of_rows(self, number: int) -> Shards:
        """The shards of another tensor of the layer, with a number of rows in all."""
        return Shards(self.ranks, number, self.replicated, self.averaged)

    def begin(
        self,
        agreed: Agreement,
        versions: tuple[Any, ...],
        rows: Tensor,
        *integers: Tensor,
        weights: tuple[Tensor, ...] = (),
    ) -> None:
        """Adds to an agreement what has to fit for every computation with rows (m, …).

        Other ranks may have other numbers of rows, unless the batch is replicated; then all bits
        of the rows and of the integers (m, …) beside them must be the same.

        Args:
            versions: each names the value of a weight; None where this rank cannot tell.
            weights: have rows of this rank alone, which the first agreement about them compares.
        """
        _ordinary(rows, *integers)
        self.ranks.check_device(rows)
        for i, weight in enumerate(weights):
            agreed.each(**{f"{_ROWS}{i}": 0 if self._apart else _bits_of_sample(weight)})
        agreed.each(rank=self.ranks.rank)
        self._now = versions
        seen = self._seen or (None,) * len(versions)
        for i, (before, now) in enumerate(zip(seen, versions, strict=True)):
            known = before is not None and now is not None
            agreed.each(**{f"{_STEPPED}{i}": int(now != before) if known else -1})
        agreed.same(num_classes=self.sharding.num_classes, layer_that_is_called=self.layer)
        agreed.same(dtype_of_rows=rows.dtype, shape_of_a_row=tuple(rows.shape[1:]))
        agreed.same(shape_of_targets=[tuple(x.shape[1:]) for x in integers])
        agreed.same(replicated=self.replicated)
        if self.replicated:
            agreed.same(replicated_rows=[checksum(x) for x in (rows, *integers)])
        agreed.each(rows=len(rows))

    def batch(self, agreed: Agreement) -> Batch:
        """The rows of all ranks, after an agreement.

        Raises RuntimeError on every rank if an optimizer stepped the weights of only some, or if
        some have the same rows.
        """
        self._check_apart(agreed)
        self._seen = self._now
        for name, stepped in agreed.found.items():
            if not name.startswith(_STEPPED) or not {0, 1} <= set(stepped):
                continue
            ranks = [str(rank) for rank, x in enumerate(stepped) if x == 0]
            raise RuntimeError(
                "the weight of a sharded output layer was changed on some ranks since the last "
                f"call, but not on rank {', '.join(ranks)}; step the optimizer on every rank or on "
                "none, with torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler in place "
                "of a GradScaler, and write rows by hand on all ranks, by load_state_dict"
            )
        return Batch(self.ranks, tuple(agreed.found["rows"]), self.replicated)

    def _check_apart(self, agreed: Agreement) -> None:
        """Raises RuntimeError if the rows of one rank were sent to others, as wrappers do."""
        compared = [found for name, found in agreed.found.items() if name.startswith(_ROWS)]
        for found in compared:
            # in a simulated group this rank answers for all
            answers = {(x, rank) for x, rank in zip(found, agreed.found["rank"], strict=True) if x}
            if len({x for x, _ in answers}) < len(answers):
                raise RuntimeError(
                    "ranks have the same rows of the weight of a sharded output layer, where each "
                    "has classes of its own; the rows of one were sent to the others, as by a "
                    "DistributedDataParallel around the layer (call "
                    "softsphere.parallel.leave_out_of_ddp(model) before it wraps the model) or by "
                    "a broadcast of all parameters (leave those of the layer out)"
                )
        self._apart |= bool(compared)

    def hidden_for_average(self, hidden: Tensor) -> Tensor:
        """hidden, with a gradient that is right after the layers below average it over ranks."""
        averaged = self._below_wrapper() if self.averaged is None else self.averaged
        if not averaged or self.replicated or not hidden.requires_grad:
            return hidden
        size, hidden = self.ranks.size, hidden.view_as(hidden)
        hidden.register_hook(lambda g: g * size)
        return hidden

    def _below_wrapper(self) -> bool:
        """Whether the forward of a DistributedDataParallel over these ranks runs the layer.

        A forward that a checkpoint repeats inside a backward is what it was the first time.
        """
        if self._wrapper_of_ranks() is not None:
            self._wrapped = True
            return True
        return self._wrapped and backward_is_running()

    def _wrapper_of_ranks(self) -> DistributedDataParallel | None:
        """The DistributedDataParallel whose forward is running, if it reduces over these ranks.

        One over another dimension of a mesh reduces between processes with the same rows.
        """
        wrapper = data_parallel_in_forward()
        if wrapper is None:
            return None
        wrapped = set(dist.get_process_group_ranks(wrapper.process_group))
        return wrapper if len(wrapped.intersection(self.ranks.of_world)) > 1 else None

    @contextmanager
    def own_numbers(self, device: torch.device) -> Iterator[None]:
        """Draws random numbers that differ from those of other ranks.

        One number is drawn from the generator of the CPU, so that ranks with the same seed go on
        with the same numbers afterwards.
        """
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        seed ^= self.ranks.rank * 0x9E3779B97F4A7C1 & (1 << 62) - 1
        devices = [device] if device.type not in ("cpu", "meta") else []
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            # not `torch.manual_seed`, which would change the generators of all other devices
            torch.default_generator.manual_seed(seed)
            for each in devices:
                with torch.get_device_module(each).device(each):
                    torch.get_device_module(each).manual_seed(seed)
            yield

    def check_below(self, layer: nn.Module, hidden: Any, target: Any) -> None:
        """Checks how the gradients of the layer, and of the layers below it, are reduced.

        Raises TypeError if hidden or target are DTensors, RuntimeError if DistributedDataParallel
        reduces the parameters of the layer, and ValueError if it cannot be known whether the
        gradients of the layers below are averaged.
        """
        _ordinary(hidden, target)
        wrapper = self._wrapper_of_ranks()
        if wrapper is None:
            self._check_averaged(hidden)
            return
        sharded = [x for x in layer.modules() if getattr(x, "shards", None) is not None]
        own = {id(p) for x in sharded for p in x.parameters(recurse=False)}
        left_out: set[str] = wrapper.parameters_to_ignore
        for name, x in wrapper.module.named_parameters():
            if id(x) in own and name not in left_out and f"module.{name}" not in left_out:
                raise RuntimeError(
                    "DistributedDataParallel has sent the weight of one rank to all, but each "
                    f"rank has rows of its own of {name}; call "
                    "softsphere.parallel.leave_out_of_ddp(model) before wrapping the model"
                )

    def _check_averaged(self, hidden: Any) -> None:
        if self.averaged is not None or self.replicated or self.ranks.size == 1:
            return
        if self._below_wrapper():
            return
        if isinstance(hidden, Tensor) and hidden.grad_fn is not None:
            raise ValueError(
                "hidden comes from layers below, whose gradients may be averaged over the ranks; "
                "make the layer with averaged=True if they are, as by DistributedDataParallel or "
                "fully_shard around those layers, or with averaged=False if they are not"
            )


def _ordinary(*given: Any) -> None:
    for x in given:
        if is_dtensor(x):
            raise TypeError(
                "hidden and targets of a layer with a process_group must be ordinary tensors, got "
                f"a DTensor with the placements {x.placements}; give to_local() of one that is "
                "Replicate() with replicated=True, or of one whose rows are sharded with "
                "replicated=False"
            )


def leave_out_of_ddp(model: nn.Module) -> nn.Module:
    """Has DistributedDataParallel leave out the sharded output layers of a model.

    Args:
        model: a module that is not wrapped yet, with any number of layers that have a
            process_group.

    Returns the model. The names of the parameters and buffers of these layers were added to those
    that DistributedDataParallel ignores.

    >>> leave_out_of_ddp(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    names = set(ignored_in_data_parallel(model))
    for path, layer in model.named_modules():
        if getattr(layer, "shards", None) is None:
            continue
        own = [*layer.named_parameters(), *layer.named_buffers()]
        names |= {f"{path}.{name}" if path else name for name, _ in own}
    if names:
        ignore_in_data_parallel(model, sorted(names))
    return model


def rows_of_one_rank(layer: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters of a sharded layer that hold the rows of this rank alone.

    Those that a parametrization computes its weight from are among them, if they have its rows.
    A DTensor knows of the rows of all ranks, as optimizers and torch.distributed.checkpoint do.
    """
    named = dict(layer.named_parameters(recurse=False))
    for tensor, computed in getattr(layer, "parametrizations", {}).items():
        rows = len(getattr(layer, tensor))
        for name, p in computed.named_parameters(recurse=False):
            if p.dim() and len(p) == rows:
                named[f"parametrizations.{tensor}.{name}"] = p
    return {name: p for name, p in named.items() if not is_dtensor(p)}


class Bits(int):
    """A number that stands for the bits of a tensor, as errors show it."""

    def __repr__(self) -> str:
        return f"bits {self & 0xFFFFFFFFFFFFFFFF:016x}"


def checksum(x: Tensor | None) -> Bits | None:
    """A number made of all bits of x, in their order; None for None.

    Each number, as an integer, is multiplied by one of 64 bits that is drawn for its place.
    """
    if x is None:
        return None
    total, start = torch.zeros((), dtype=torch.int64, device=x.device), 1
    for part in x.detach().contiguous().view(-1).split(_PART):
        bits = part.view(_INTEGERS[part.element_size()]).to(torch.int64)
        places = torch.arange(start, start + len(bits), device=x.device)
        total, start = total + (bits * _drawn(places)).sum(), start + len(bits)
    return Bits(int(total))


def _bits_of_sample(weight: Tensor) -> int:
    """A number made of the bits of some rows; 0 if they say nothing, since all are one number."""
    W = weight.detach()
    if not W.numel():
        return 0
    some = min(len(W), _SAMPLE)
    W = W[torch.linspace(0, len(W) - 1, some, dtype=torch.int64, device=W.device)]
    bits = checksum(W)
    assert bits is not None
    return 0 if bool((W[0, 0] == W).all()) else bits % (1 << 62) or 1


def _drawn(x: Tensor) -> Tensor:
    """A number of 64 bits for each number, by the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = x * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
