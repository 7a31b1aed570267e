"""Sums over equal indices, which wait for no device and have the same bits where they must."""

from __future__ import annotations

from torch import Tensor, searchsorted, uint8

__all__ = ["add_at", "places_in_few_launches", "places_of_equals"]

# Up to so many indices a GPU compares each with each, in fewer launches than a sort takes.
_FEW = 1024


def places_of_equals(index: Tensor) -> tuple[Tensor, Tensor]:
    """The entries (n) in some order, and for each entry the first place that has its equal.

    What is summed at these places is zero at the others, so that it can be added to all entries.
    The shapes do not depend on the numbers, so that no device has to be waited for.
    """
    ordered = index.sort().values
    return ordered, searchsorted(ordered, index)


def places_in_few_launches(index: Tensor) -> tuple[Tensor, Tensor]:
    """The same, faster where launching operations takes longer than running them.

    Which way is faster depends on n, so that a traced program should take the other function.
    """
    if index.device.type == "cpu" or not 0 < len(index) <= _FEW:
        return places_of_equals(index)
    return _by_comparing(index)


def _by_comparing(index: Tensor) -> tuple[Tensor, Tensor]:
    equal = index.unsqueeze(1) == index
    return index, equal.view(uint8).argmax(1)


def add_at(out: Tensor, index: Tensor, x: Tensor, *, deterministic: bool) -> Tensor:
    """out[index] += x in place, equal indices adding up. Returns out.

    deterministic: whether no atomic additions are used on a GPU, which have any order, so that
        each bit of the sums is the same every time.
    """
    if deterministic:
        return out.index_put_((index,), x, accumulate=True)
    return out.index_add_(0, index, x)
