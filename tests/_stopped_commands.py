"""Commands in processes of their own, which tests stop and resume. Reads /proc."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from _lab_studies import untimed
from softsphere_lab.study import protocol as study

__all__ = ["all_end", "asked", "kept_lines", "lines", "start", "stop", "workers"]


def lines(folder: Path) -> list:
    return [
        json.dumps(untimed(json.loads(line)))
        for name in (study.TRIALS, study.RUNS)
        for line in (folder / name).read_text().splitlines()
    ]


def asked(name: str, folder: Path) -> list[str]:
    return ["reproduce", name, "--budget", "smoke", "--out", str(folder)]


def start(name: str, folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "softsphere_lab", *asked(name, folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # sums of several threads differ in the last digit from those of one
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def workers(pid: int) -> list[int]:
    """The processes that one has begun, and theirs."""
    found = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in workers(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(processes: list[int]) -> bool:
    """Whether all end soon: one that has closed its pipes is seen for some moments yet."""
    end = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, processes))


def kept_lines(folder: Path) -> set[str]:
    files = [folder / name for name in (study.TRIALS, study.RUNS)]
    return {line for file in files if file.exists() for line in file.read_text().splitlines()}


def stop(process: subprocess.Popen, file: Path, sent: int) -> str:
    """Stops a command when a file has a line, and all that it has begun ends; what it said."""
    end = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < end:
        if file.exists() and file.stat().st_size > 10:
            break
        time.sleep(0.02)
    begun = workers(process.pid)
    if sent == signal.SIGINT:  # the terminal tells all of its processes
        os.killpg(process.pid, sent)
    else:
        process.kill()
    # their pipes are open as long as one of them is there
    said = "".join(process.communicate(timeout=60))
    assert all_end(begun)
    return said
