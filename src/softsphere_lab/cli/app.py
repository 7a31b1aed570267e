"""The command line. An error of use is one line and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import softsphere as library
from softsphere_lab.cli.compare import compare
from softsphere_lab.cli.losses_command import losses
from softsphere_lab.cli.report_command import report
from softsphere_lab.cli.reproduce import reproduce
from softsphere_lab.cli.tune import tune
from softsphere_lab.errors import LabError

__all__ = ["main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
for command in (compare, tune, losses, reproduce, report):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    """Prints the version and leaves, if it is wanted."""
    if wanted:
        typer.echo(f"softsphere {library.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def softsphere(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Compare softmax with its spherical alternatives."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> int:
    """Runs the command line and returns the exit code."""
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
