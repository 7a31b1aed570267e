"""Whether Python may look at the values of tensors.

It looks at them on a CPU, to choose how to go on. A step that is compiled there has to be the same
whatever the values are, as on a GPU, where looking would wait for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["recording", "step_is_recorded", "values_are_unread", "values_unread"]


class _Now(threading.local):
    """What holds in this thread."""

    unread = False
    recorded = False


_now = _Now()


@contextmanager
def values_unread() -> Iterator[None]:
    """Inside it no value is looked at, on a CPU either."""
    before, _now.unread = _now.unread, True
    try:
        yield
    finally:
        _now.unread = before


@contextmanager
def recording() -> Iterator[None]:
    """Inside it a step is recorded rather than taken, and no value is looked at."""
    before, _now.recorded = _now.recorded, True
    try:
        with values_unread():
            yield
    finally:
        _now.recorded = before


def values_are_unread() -> bool:
    """Whether values are not to be looked at."""
    return _now.unread


def step_is_recorded() -> bool:
    """Whether a step is recorded on a CPU, so that its operations change nothing yet."""
    return _now.recorded
