"""Threads take turns at factored weights."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

__all__ = ["in_turn", "only_thread", "turn"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Turns:
    """Who may read or write factors now.

    There is one lock for all of them: an operation may read one weight and write another.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.lock = threading.RLock()


_turns = _Turns()
if hasattr(os, "register_at_fork"):
    # a thread that had the turn does not exist in the child, where it would never end
    os.register_at_fork(after_in_child=_turns.begin)


def turn() -> AbstractContextManager[Any]:
    """Waits until no other thread reads or writes factors, and keeps the others waiting inside.

    The factors of W change together, even where W stays as it is, as when it is saved. A thread
    that saves or evaluates a layer while another one trains it must not see half of a change.

    Inside it no backward pass may be begun: PyTorch runs that of a GPU in a thread of its own.
    Ranks of process groups wait for one another inside it, so that their threads must come to
    sharded weights in the same order.
    """
    return _turns.lock


def only_thread() -> bool:
    """Whether there is no other thread, nor can be before this one goes on."""
    return threading.active_count() == 1


def in_turn(function: _Function) -> _Function:
    """Makes a function run in the turn of its thread."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with turn():
            return function(*args, **kwargs)

    return cast(_Function, run)
