"""Runs that raise an error while they are timed beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.clock import Run, in_turn, wait_for

__all__ = ["DeviceLostError", "check_device", "in_turn_but", "reason"]

# After such an error every later call on the device fails as well, in the same process.
_FATAL = ("device-side assert", "illegal memory access", "misaligned address", "launch failure")


class DeviceLostError(LabError):
    """A device that no longer computes anything for this process."""


class _RaisedError(Exception):
    """An error of the run of that name."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name, self.error = name, error


def in_turn_but(
    runs: Mapping[str, Run],
    turns: int | Callable[[float], int],
    device: torch.device | str = "cpu",
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Returns the times of `in_turn`, and the errors of the runs that it does without.

    Any kind of error counts: that of a kernel library is often no RuntimeError. The others are
    timed without the run, from the beginning, unless the error ends all work on the device.
    """
    left, errors = dict(runs), dict[str, Exception]()
    while left and not any(_is_fatal(error, device) for error in errors.values()):
        try:
            checked = {name: partial(_named, name, run, device) for name, run in left.items()}
            # a first call may compile, and is no measure of how long the others take
            for each in checked.values():
                each()
            return in_turn(checked, turns, device), errors
        except _RaisedError as raised:
            errors[raised.name] = raised.error.with_traceback(None)  # which would keep tensors
            del left[raised.name]
    return {}, errors


def _named(name: str, run: Run, device: torch.device | str) -> Any:
    """Runs it to its end. Raises _RaisedError for any error."""
    try:
        result = run()
        wait_for(device)  # an error of a kernel comes late
    except Exception as error:
        raise _RaisedError(name, error) from None
    return result


def check_device(errors: Iterable[Exception], device: torch.device | str) -> None:
    """Raises DeviceLostError if one of the errors ends all work of this process on the device."""
    for error in errors:
        if _is_fatal(error, device):
            raise DeviceLostError(
                f"the device is lost to this process ({reason(error)}); what is measured is kept, "
                "and a new process goes on behind this case: --resume --out FOLDER"
            )


def _is_fatal(error: Exception, device: torch.device | str) -> bool:
    """Whether CUDA raised it, and nothing works on the device from then on."""
    of_cuda = getattr(torch, "AcceleratorError", ())  # torch 2.8 brought it
    suspect = isinstance(error, of_cuda) or any(words in str(error) for words in _FATAL)
    return suspect and not _computes(device)


def _computes(device: torch.device | str) -> bool:
    """Whether a device still does."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1
    except RuntimeError:
        return False


def reason(error: Exception) -> str:
    """Returns the kind of an error and the first line of what it says, for a cell of a table."""
    said = str(error).strip().partition("\n")[0]
    kind = type(error).__name__
    return f"{kind}: {said}"[:120] if said else kind
