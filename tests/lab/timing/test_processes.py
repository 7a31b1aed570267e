"""A step is timed in a process of its own, which ends with the one that asked for it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from softsphere_lab.errors import LabError
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.head_measures import Found
from softsphere_lab.timing.processes import (
    FORWARD_BACKWARD,
    TookTooLongError,
    measure,
    measure_head,
)
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED

SETTING = Setting(D=100, d=8, m=16)
SHORT = Effort(seconds=0.05, warm_up=1, fewest=1)


def test_a_training_step_has_a_time_and_no_memory():
    measured = measure(FACTORED, SETTING, SHORT)
    assert 0 < measured.seconds < 1 and measured.extra_bytes is None


def test_forward_and_backward_of_logits_keep_several_sizes_of_them():
    measured = measure("softmax", Setting(D=5000, d=8, m=64), SHORT, kind=FORWARD_BACKWARD)
    assert 0 < measured.seconds < 1
    # the outputs and their gradient at least
    assert measured.extra_bytes >= 2 * 4 * 5000 * 64


def test_what_takes_too_long_is_ended():
    start = time.monotonic()
    with pytest.raises(TookTooLongError, match=r"factored .* takes more than 1 s"):
        measure(FACTORED, SETTING, Effort(seconds=600, most=10**9), patience=1)
    assert time.monotonic() - start < 60


def test_a_layer_that_fails_says_why():
    with pytest.raises(LabError, match=r"no layer at D = 10[\s\S]*KeyError: 'no layer'"):
        measure("no layer", Setting(10, 4, 4))


@pytest.mark.skipif(sys.platform == "win32", reason="the process is a shell script")
@pytest.mark.parametrize(
    ("end", "patience", "error", "said"),
    [
        ("echo 'torch.OutOfMemoryError: no room' >&2; exit 1", None, LabError, "no room"),
        ("exec sleep 600", 0.5, TookTooLongError, "takes more than 0.5 s"),
    ],
)
def test_what_was_measured_before_a_failure_is_kept(
    end, patience, error, said, tmp_path, monkeypatch
):
    program = tmp_path / "program"
    lines = '["milliseconds", 1.5]\\n["extra MiB", "no room"]\\n["mil'
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    found = []
    with pytest.raises(error, match=said):
        found.extend(measure_head("gram", SETTING, SHORT, patience=patience))
    assert found == [Found("milliseconds", 1.5), Found("extra MiB", "no room")]


def test_what_libraries_print_is_no_result():
    script = (
        "import os, sys\n"
        "from softsphere_lab.timing.processes import _results\n"
        "out = _results()\n"
        "print('Autotuning', flush=True)\n"
        "os.write(1, b'by a library in C')\n"
        "print('[1]', file=out, flush=True)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert said.stdout.split() == [b"[1]"]
    assert b"Autotuning" in said.stderr and b"by a library in C" in said.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_that_times_ends_with_the_one_that_asked_for_it():
    script = (
        "from softsphere_lab.timing.clock import Effort\n"
        "from softsphere_lab.timing.setting import Setting\n"
        "from softsphere_lab.timing.processes import measure\n"
        "from softsphere_lab.timing.training_steps import FACTORED\n"
        "measure(FACTORED, Setting(1000, 1024, 1024), Effort(600.0))"
    )
    asker = subprocess.Popen([sys.executable, "-c", script])
    children = Path(f"/proc/{asker.pid}/task/{asker.pid}/children")
    end = time.monotonic() + 60
    while not children.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    child = int(children.read_text())
    asker.kill()
    asker.wait()
    # by itself it would take a minute
    end = time.monotonic() + 25
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
