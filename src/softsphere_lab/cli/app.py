"""The command line: an error of use is one line and exit code 2."""

from __future__ import annotations

import sys

import typer

from softsphere_lab.cli.compare import compare
from softsphere_lab.cli.engines_command import engines
from softsphere_lab.cli.report_command import report
from softsphere_lab.cli.reproduce import reproduce
from softsphere_lab.cli.twins_command import twins
from softsphere_lab.errors import LabError

__all__ = ["main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(compare)
app.command()(engines)
app.command()(twins)
app.command()(reproduce)
app.command()(report)


@app.callback()
def softsphere() -> None:
    """Softmax and its spherical alternatives, compared."""


def main() -> int:
    """Runs the command line. Returns the exit code."""
    try:
        return int(app(prog_name="softsphere", standalone_mode=False) or 0)
    except Exception as error:
        # typer's errors of use have a base class that differs between its versions
        message = getattr(error, "format_message", None)
        if not isinstance(error, (LabError, OSError, typer.Abort)) and message is None:
            raise
        if isinstance(error, typer.Abort):
            raise KeyboardInterrupt from None
        print(f"softsphere: {message() if message else error}", file=sys.stderr)
        return 2
