"""The command before the command line: interrupts while it is imported, and poor terminals."""

from __future__ import annotations

import importlib.util
import io
import signal
import subprocess
import sys

import pytest

from _systems import posix
from softsphere_lab import __main__

# Imports a module as some packages do that are interrupted: they swallow the KeyboardInterrupt.
SWALLOWING = """
import os, signal, sys

interrupted = sys.argv.pop(1)

class Swallowing:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000):
                    pass
            except KeyboardInterrupt:
                pass

sys.meta_path.insert(0, Swallowing())
from softsphere_lab.__main__ import main

code = main()
print("not stopped")
sys.exit(code)
"""


def test_an_interrupt_while_the_lab_is_imported_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.util, "find_spec", interrupted)
    assert __main__.main() == 130
    assert capsys.readouterr().err == "softsphere: stopped\n"


def test_an_interrupt_while_the_data_are_loaded_is_one_line_or_none(monkeypatch, capsys):
    from softsphere_lab.data import images as data

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    monkeypatch.setattr(sys, "argv", ["softsphere", "compare"])
    assert __main__.main() == 130
    # versions of typer differ in what of this they take upon themselves
    assert capsys.readouterr().err.strip() in ("", "softsphere: stopped", "Aborted.")


def test_a_terminal_without_utf_8_gets_the_table_all_the_same(monkeypatch):
    got = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(got, encoding="ascii"))
    monkeypatch.setattr(
        __main__, "_run_command_line", lambda: print("1.61 ± 0.04", flush=True) or 0
    )
    assert __main__.main() == 0
    assert got.getvalue() == b"1.61 ? 0.04\n"


def test_streams_that_are_no_terminals_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(__main__, "_run_command_line", lambda: 0)
    assert __main__.main() == 0


@posix
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("softsphere_lab.cli.app", ["--version"]),
        ("torch", ["--version"]),
        ("sklearn.datasets", ["compare", "--epochs", "1", "--seeds", "1"]),
    ],
)
def test_an_interrupt_that_an_import_swallows_ends_the_command_at_once(module, arguments, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", SWALLOWING, module, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "softsphere: stopped\n"
    assert list(tmp_path.iterdir()) == []


def test_interrupts_are_as_before_once_the_command_is_done(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    seen = []
    monkeypatch.setattr(
        __main__, "_run_command_line", lambda: seen.append(signal.getsignal(signal.SIGINT)) or 0
    )
    assert __main__.main() == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert seen != [before] or before is not signal.default_int_handler


def test_a_command_starts_without_what_only_reports_need():
    slow = {"scipy", "sklearn", "pandas", "matplotlib.axes", "datasets", "transformers"}
    code = "import sys, softsphere_lab.cli.app; print(*sys.modules, sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert "softsphere_lab.report.summary" in run.stdout.split()
    assert slow.isdisjoint(run.stdout.split())
