"""Counts what the collectives of this process send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Traffic", "count_traffic", "note"]


@dataclass
class Traffic:
    """The collectives that a process took part in, in their order.

    calls: for each, its name ("all_gather", "all_to_all" or "all_reduce") and the bytes of the
        tensor that this rank gave to it.
    """

    calls: list[tuple[str, int]] = field(default_factory=list)

    @property
    def messages(self) -> int:
        """The number of collectives."""
        return len(self.calls)

    @property
    def bytes(self) -> int:
        """The bytes that this rank gave to all of them."""
        return sum(size for _, size in self.calls)


_active: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts the collectives of sharded output layers inside the context.

    Those of other layers, such as DistributedDataParallel, are not counted.

    Yields a `Traffic`, whose `messages` and `bytes` are what this rank has given to collectives
    since the context was entered.

    >>> with count_traffic() as traffic:
    ...     pass
    >>> traffic.messages, traffic.bytes
    (0, 0)
    """
    traffic = Traffic()
    _active.append(traffic)
    try:
        yield traffic
    finally:
        del _active[next(i for i, x in enumerate(_active) if x is traffic)]


def note(name: str, size: int) -> None:
    """Adds a collective to every count that is open."""
    for traffic in _active:
        traffic.calls.append((name, size))
