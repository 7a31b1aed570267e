"""A Ctrl-C, and other threads, wait until what must not be left half written has been written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from softsphere.matrix.turns import turn

__all__ = ["undisturbed", "uninterrupted"]


class _Now(threading.local):
    """Whether this thread is inside a block that delays SIGINT."""

    delayed = False


_now = _Now()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays SIGINT until the block has ended, so that the factors are never left half written.

    Outside the main thread, where Python handles no signals, this does nothing, and neither does it
    inside another such block.
    """
    if _now.delayed or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    old = signal.getsignal(signal.SIGINT)
    if old is None:  # the handler was not set by Python
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    _now.delayed = True
    try:
        yield
    finally:
        _now.delayed = False
        signal.signal(signal.SIGINT, old)
        if held and callable(old):
            old(*held[-1])
        elif held and old == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delays SIGINT, and keeps other threads from the factors, until the block has ended."""
    with turn(), uninterrupted():
        yield
