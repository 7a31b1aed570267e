"""The ranks of a process group, and the collectives that sharded output layers use.

Every collective is counted, and one that fails raises an error that says what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from softsphere._torch import gather_tensors
from softsphere.parallel.traffic import note

__all__ = ["Ranks"]


class Ranks:
    """A process group, as a layer keeps it. Copies of the layer share it.

    Args:
        group: a process group of torch.distributed, or a DeviceMesh of one dimension.

    Raises RuntimeError if torch.distributed is not initialised, TypeError for another kind of
    argument, and ValueError for a mesh of several dimensions or a group without this process.
    """

    def __init__(self, group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "process_group needs torch.distributed; call torch.distributed.init_process_group "
                "first, in a program that torchrun starts, or leave process_group None"
            )
        from torch.distributed.device_mesh import DeviceMesh  # a build may have none

        if group is dist.GroupMember.NON_GROUP_MEMBER or (
            isinstance(group, DeviceMesh) and group.get_coordinate() is None
        ):
            raise ValueError("process_group must contain this process, got a group without it")
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"process_group must be a mesh of one dimension, got one of {group.ndim}; "
                    "choose a dimension by its name, as in mesh['tp']"
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a process group or a DeviceMesh of one dimension, got "
                f"{group!r}; torch.distributed.group.WORLD is the group of all processes"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # whether this rank is in an agreement, where one with an error sends nothing
        self.agreeing = False
        self._owed: list[Callable[[], None]] = []

    def owe(self, finish: Callable[[], None]) -> None:
        """Has something done before the next agreement, for which the ranks need each other.

        All ranks must owe the same things in the same order.
        """
        if finish not in self._owed:
            self._owed.append(finish)

    def settle(self) -> None:
        """Does what is owed."""
        owed, self._owed = self._owed, []
        for finish in owed:
            finish()

    @property
    def of_world(self) -> list[int]:
        """The ranks of the group among all processes, in the order of the group."""
        return dist.get_process_group_ranks(self.group)

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a layer with a process_group cannot be pickled, since its process group exists in "
            "this process alone; save its state_dict() with torch.distributed.checkpoint"
        )

    @property
    def device_types(self) -> list[str]:
        """The types of the devices that the group sends from, as its backends have them."""
        backends = dist.get_backend_config(self.group).split(",")
        return [backend.partition(":")[0] for backend in backends]

    @property
    def device(self) -> torch.device:
        """Where small messages are: on the CPU, unless the group has GPUs alone.

        Then it is the GPU that `init_process_group` was given, or else the current one.
        """
        kinds = self.device_types
        if "cpu" in kinds:
            return torch.device("cpu")
        given: torch.device | None = getattr(self.group, "bound_device_id", None)
        return torch.device(kinds[0]) if given is None else given

    def check_device(self, x: Tensor) -> None:
        """Raises ValueError if the group has no backend for the device of x."""
        if x.device.type not in self.device_types:
            raise ValueError(
                f"process_group must have a backend for tensors on {x.device.type}, got "
                f"{dist.get_backend_config(self.group)!r}; move the layer and hidden to "
                f"{' or '.join(self.device_types)}, or call torch.distributed.init_process_group "
                "with backend='cpu:gloo,cuda:nccl'"
            )

    def gather(self, x: Tensor) -> Tensor:
        """x (…) of every rank, in the order of the ranks: (size, …). All have the same shape."""
        x = x.detach().contiguous()
        out = x.new_empty(self.size, *x.shape)
        with self._collective("all_gather", x):
            gather_tensors(out.view(-1), x.view(-1), self.group)
        return out

    def exchange(self, x: Tensor) -> Tensor:
        """x (size, …) has a part for each rank. Returns the parts for this rank: (size, …)."""
        x = x.detach().contiguous()
        out = torch.empty_like(x)
        with self._collective("all_to_all", x):
            dist.all_to_all_single(out, x, group=self.group)
        return out

    def exchange_rows(self, x: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """Sends given[r] rows of x to each rank r, one rank after another.

        Returns the taken[r] rows from each rank r, in the order of the ranks, where x is.
        """
        there, x = x.device, x.detach().contiguous()
        if there.type == "cpu":  # as in a state_dict; NCCL sends nothing from there
            x = x.to(self.device)
        out = x.new_empty(sum(taken), *x.shape[1:])
        with self._collective("all_to_all", x):
            dist.all_to_all_single(out, x, taken, given, group=self.group)
        return out.to(there)

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in an order of the backend's.

        All ranks have the same bits where at most one of them gives a number that is not zero.
        """
        out = x.detach().clone(memory_format=torch.contiguous_format)
        with self._collective("all_reduce", out):
            dist.all_reduce(out, group=self.group)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, with the same bits on each."""
        return self.gather(x).sum(0)

    def objects(self, x: Any) -> list[Any]:
        """An object of every rank, for error messages."""
        out: list[Any] = [None] * self.size
        none = torch.empty(0, device="cpu")
        with self._collective("all_gather", none), _current(self.device):
            dist.all_gather_object(out, x, self.group)
        return out

    @contextmanager
    def _collective(self, name: str, x: Tensor) -> Iterator[None]:
        if self.agreeing:
            raise RuntimeError(
                f"{name} of a sharded output layer inside an agreement of its ranks, where another "
                "rank may have failed; call the layer from one thread at a time"
            )
        note(name, x.nbytes)
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"a collective ({name} of {x.nbytes} bytes) of a sharded output layer failed on "
                f"rank {self.rank} of {self.size}. Another rank has ended, has raised an error, or "
                "did not come to the same step within the timeout of the process group. Look at "
                "the first error of the other ranks, and resume from the last checkpoint"
            ) from error


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, from which PyTorch sends objects."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    current: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return current
