"""Sums over equal indices, which wait for no device and have the same bits where they must."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere._torch import values_on_cpu
from softsphere.unread import step_is_recorded

__all__ = ["Places", "add_at", "places_of_equals"]

# Up to so many indices a GPU compares each with each, in fewer launches than a sort takes, and
# Python counts how many are different in less time than a CPU needs to sort them.
_FEW = 1024
# Up to so many rows a compiled program sums by a product in less time than by atomic additions.
_FEWER = 256


@dataclass(frozen=True)
class Places:
    """n indices, and where each has its first equal.

    index: (n) the indices in some order
    first: (n) for each of those asked for, the first place in that order that has its equal; None
        where no two are equal, and the order is that asked for
    """

    index: Tensor
    first: Tensor | None

    @classmethod
    def of(cls, index: Tensor) -> Places:
        """Finds them in the way that takes the least time for this n and this device.

        A traced program should take `places_of_equals`, which is the same for every n.
        """
        if _are_different(index):
            return cls(index, None)
        if index.device.type == "cpu" or not 0 < len(index) <= _FEW:
            return cls(*places_of_equals(index))
        return cls(*_by_comparing(index))

    def sums(self, x: Tensor, *, deterministic: bool = False) -> Tensor:
        """The sums of x (n, …) over equal indices, at their first places; 0 at the others (n, …).

        So they can be added to what `index` picks, whether or not some of it is picked twice.
        """
        if self.first is None:
            return x
        if step_is_recorded() and x.dim() == 2 and len(x) <= _FEWER:
            chosen = torch.arange(len(x), device=x.device).unsqueeze(1) == self.first
            return chosen.to(x.dtype) @ x
        return add_at(torch.zeros_like(x), self.first, x, deterministic=deterministic)

    def sums_for_each(self, x: Tensor, *, deterministic: bool = False) -> Tensor:
        """The sums of x (n, …) over equal indices, for each index (n, …)."""
        sums = self.sums(x, deterministic=deterministic)
        return sums if self.first is None else sums.index_select(0, self.first)


def places_of_equals(index: Tensor) -> tuple[Tensor, Tensor]:
    """The entries (n) in some order, and for each entry the first place that has its equal.

    The shapes do not depend on the numbers, so that no device has to be waited for.
    """
    ordered = index.sort().values
    return ordered, torch.searchsorted(ordered, index)


def _are_different(index: Tensor) -> bool:
    """Whether no two indices are equal, as far as that is known without waiting for a device."""
    if len(index) > _FEW or not values_on_cpu(index):
        return False
    return len(set(index.tolist())) == len(index)


def _by_comparing(index: Tensor) -> tuple[Tensor, Tensor]:
    equal = index.unsqueeze(1) == index
    return index, equal.view(torch.uint8).argmax(1)


def add_at(out: Tensor, index: Tensor, x: Tensor, *, deterministic: bool) -> Tensor:
    """out[index] += x in place, equal indices adding up. Returns out.

    deterministic: whether no atomic additions are used on a GPU, which have any order, so that
        each bit of the sums is the same every time.
    """
    if deterministic:
        return out.index_put_((index,), x, accumulate=True)
    return out.index_add_(0, index, x)
