"""The command line without a command, its version, its list of losses, and errors of use."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest
from rich.console import Console

import softsphere
from softsphere import losses
from softsphere_lab.cli import app as cli
from softsphere_lab.cli import losses_command


def run_command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["softsphere", *arguments])
    return cli.main()


def test_without_a_command_it_shows_its_help(monkeypatch, capsys):
    assert run_command(monkeypatch) == 0
    bare = capsys.readouterr()
    assert run_command(monkeypatch, "--help") == 0
    assert bare.out.split() == capsys.readouterr().out.split()
    assert all(name in bare.out for name in ("compare", "losses", "reproduce", "report"))
    assert bare.err == ""


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert run_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"softsphere {softsphere.__version__}\n"


def test_every_loss_is_listed_with_its_numbers(monkeypatch, capsys):
    assert run_command(monkeypatch, "losses") == 0
    rows = {words[0]: " ".join(words) for line in capsys.readouterr().out.splitlines()
            if (words := line.split())}  # fmt: skip
    for name, kind in losses.REGISTRY.items():
        assert all(field.name in rows[name] for field in fields(kind))
    assert "a=1 b=4 a, b yes" in rows["z_loss"]
    assert rows["softmax"].endswith("no")


def test_the_names_of_losses_are_whole_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(
        losses_command, "standard_console", lambda: Console(width=80, file=sys.stdout)
    )
    assert run_command(monkeypatch, "losses") == 0
    said = capsys.readouterr().out
    assert "…" not in said and all(name in said.split() for name in losses.REGISTRY)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "bogus"),
        (["--bogus"], "--bogus"),
        (["losses", "more"], "more"),
        (["report", "--records", ""], "--records"),
        (["twins"], "twins"),
    ],
)
def test_an_error_of_use_is_one_line_and_exit_code_2(arguments, words, monkeypatch, capsys):
    assert run_command(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("softsphere: ") and len(said.err.splitlines()) == 1
    assert words in said.err and said.out == ""
