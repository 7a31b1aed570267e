"""The command before the command line: interrupts while it is imported, and poor terminals."""

from __future__ import annotations

import importlib.util
import io
import sys

from softsphere_lab import __main__


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
    monkeypatch.setattr(__main__, "command", lambda: print("1.61 ± 0.04", flush=True) or 0)
    assert __main__.main() == 0
    assert got.getvalue() == b"1.61 ? 0.04\n"


def test_streams_that_are_no_terminals_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(__main__, "command", lambda: 0)
    assert __main__.main() == 0
