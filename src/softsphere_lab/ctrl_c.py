"""What a Ctrl-C does before there is anything to keep."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["leaving_at_once", "raise_interrupts"]


def _leave(signum: int, frame: FrameType | None) -> None:
    """Ends the process with one line on standard error and the exit code of an interrupt."""
    if sys.stderr is not None:
        os.write(2, b"softsphere: stopped\n")
    os._exit(130)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Makes Ctrl-C end the process at once, until `raise_interrupts` or the end of the block.

    An exception will not do while packages are imported: some of them swallow a KeyboardInterrupt
    and are broken from then on, which ends in an error that has nothing to do with the interrupt.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        raise_interrupts()


def raise_interrupts() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, for work that keeps what is finished."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
