"""How processes that a command has started end with it, and do not see its Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from os import _exit

__all__ = ["begin_process", "interrupts_held_back"]


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Holds Ctrl-C back: a process that is started meanwhile never sees it, this one only later."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_process(lifeline: Connection) -> None:
    """Is called first in a process that ends when the one that started it does, however it ends.

    lifeline: one end of a pipe whose other end only the process that started this one holds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    """Waits until no process holds the other end, and leaves at once."""
    try:
        lifeline.recv()
    except EOFError:
        _exit(1)
