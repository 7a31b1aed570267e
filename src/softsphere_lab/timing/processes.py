"""The time of a step, measured in a process of its own.

What one layer leaves in the allocator and the caches then means nothing to the next. The process is
`python -m softsphere_lab.timing.processes JSON`; it prints a line of JSON for each result.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.clock import Effort, step_times
from softsphere_lab.timing.gpu_steps import ON_GPU
from softsphere_lab.timing.head_measures import BFLOAT16, Found, head_measures
from softsphere_lab.timing.linear_losses import LINEAR_LOSSES, ForwardBackward
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.steps import Repeated
from softsphere_lab.timing.training_steps import CHUNKED, CLUSTERS, LAYERS, REPEATED

__all__ = [
    "FORWARD_BACKWARD",
    "TRAINING_STEP",
    "Measured",
    "TookTooLongError",
    "measure",
    "measure_head",
]

TRAINING_STEP, FORWARD_BACKWARD, HEAD = "training step", "forward and backward", "head"
KINDS: Mapping[str, Mapping[str, Callable[[Setting], Any]]] = {
    TRAINING_STEP: {**LAYERS, **REPEATED, **CHUNKED, **CLUSTERS, **ON_GPU},
    FORWARD_BACKWARD: LINEAR_LOSSES,
}


class TookTooLongError(LabError):
    """A step that was no longer waited for."""


@dataclass(frozen=True)
class Measured:
    """The median seconds of a step.

    extra_bytes: of forward and backward, the peak of what was allocated beyond the gradients; None
    for a training step. mean: of the seconds of the same steps. captures, replayed: how many graphs
    were captured, and the share of the timed steps that were replayed; None for other steps.
    """

    seconds: float
    extra_bytes: int | None
    mean: float
    captures: int | None = None
    replayed: float | None = None


def measure(
    name: str,
    setting: Setting,
    effort: Effort | None = None,
    *,
    kind: str = TRAINING_STEP,
    device: str = "cpu",
    patience: float | None = None,
) -> Measured:
    """Times the step of that name in a process of its own, with as many threads as this one has.

    kind: TRAINING_STEP or FORWARD_BACKWARD. device: where all of its tensors are. patience: the
    seconds after which the process is ended.
    Raises: LabError with what the process printed if it failed, TookTooLongError if its time is up.
    """
    said, failure = _apart(name, kind, setting, effort, device, patience)
    if failure is not None:
        raise failure
    return Measured(**said[-1])


def measure_head(
    name: str,
    setting: Setting,
    effort: Effort | None = None,
    *,
    device: str = "cpu",
    precision: str = BFLOAT16,
    patience: float | None = None,
) -> Iterator[Found]:
    """Measures the head of that name in a process of its own; see `head_measures`.

    Yields what the process had measured when it ended. Raises after that what `measure` raises.
    """
    said, failure = _apart(name, HEAD, setting, effort, device, patience, precision=precision)
    yield from (Found(*each) for each in said)
    if failure is not None:
        raise failure


def _apart(
    name: str,
    kind: str,
    setting: Setting,
    effort: Effort | None,
    device: str,
    patience: float | None,
    **more: str,
) -> tuple[list[Any], LabError | None]:
    """Returns the results of a process of its own, and why there are no more of them, or None."""
    job = {
        **more,
        "name": name,
        "kind": kind,
        "setting": asdict(setting),
        "effort": asdict(effort or Effort()),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "softsphere_lab.timing.processes", json.dumps(job)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as wrong,
        # its standard input ends with this process, and that ends the other one too
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=wrong) as process,
    ):
        failure: LabError | None = None
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failure = TookTooLongError(f"{name} at {setting} takes more than {patience} s")
        else:
            if status:
                wrong.seek(0)
                said = wrong.read().strip()[-2000:] or f"exit status {status}"
                failure = LabError(f"{name} at {setting} failed:\n{said}")
        out.seek(0)
        # a line without its end is of a process that was ended
        results = [json.loads(line) for line in out.read().split("\n")[:-1]]
    return results, failure


def _leave_with_parent() -> None:
    """Waits for the end of standard input, and leaves at once."""
    sys.stdin.read()
    os._exit(1)


def _results() -> TextIO:
    """Standard output, for results alone: what libraries print there goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _main(text: str) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = json.loads(text)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    setting, effort = Setting(**job["setting"]), Effort(**job["effort"])
    out = _results()
    if job["kind"] == HEAD:
        how = job["device"], job["precision"]
        for found in head_measures(job["name"], setting, effort, *how):
            print(json.dumps(found), file=out, flush=True)
    else:
        print(json.dumps(asdict(_step_measured(job, setting, effort))), file=out, flush=True)


def _step_measured(job: Mapping[str, Any], setting: Setting, effort: Effort) -> Measured:
    """The time of a step and, of forward and backward, its memory."""
    device = job["device"]
    with torch.device(device):
        step = KINDS[job["kind"]][job["name"]](setting)
    times = step_times(step, setting, effort, device)
    extra = captures = replayed = None
    if isinstance(step, ForwardBackward):
        extra = step.extra_bytes(*setting.batch(torch.Generator(device).manual_seed(0)))
    if isinstance(step, Repeated):
        timed = step.eager[-len(times) :]  # without the warm-up
        captures, replayed = step.captures, timed.count(False) / len(timed)
    return Measured(statistics.median(times), extra, statistics.mean(times), captures, replayed)


if __name__ == "__main__":
    _main(sys.argv[1])
