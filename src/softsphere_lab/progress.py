"""What a long run shows while it works, and what it says when it is stopped."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Phases", "print_plain", "print_stopped", "standard_console"]


def standard_console() -> Console:
    """Returns a console on standard output, wide enough for a table where it is no terminal.

    Nothing is printed if standard output is closed.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if is_terminal else 120)


def print_plain(console: Console, text: str) -> None:
    """Prints a line as it is: no markup, no colours, no line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Phases:
    """Bars for the search and for the final runs on a terminal, and nothing elsewhere.

    How many trials a search takes is not known before it is finished, so that its bar counts them
    without a total. The number of final runs is known from the start. No total ever grows.
    """

    def __init__(self, console: Console, searches: bool) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.search = self.progress.add_task("search", total=None) if searches else None
        self.final = self.progress.add_task("final runs", total=None)

    def __enter__(self) -> Phases:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def describe(self, searching: bool, what: str) -> None:
        """Shows what is being done in one of the phases."""
        if searching and self.search is not None:
            self.progress.update(self.search, description=f"search: {what}")
        else:
            self.progress.update(self.final, description=f"final runs: {what}")

    def show_search(self, trials: int, searching: bool) -> None:
        """Shows how many trials are done; once the search is finished, there are no more."""
        if self.search is not None:
            self.progress.update(self.search, completed=trials)
            if not searching:
                self.progress.update(self.search, total=trials, description="search: finished")

    def show_finals(self, done: int, in_all: int) -> None:
        """Shows how many final runs are done."""
        self.progress.update(self.final, completed=done, total=in_all)


def print_stopped(console: Console, folder: Path) -> None:
    """Says how to continue after a Ctrl-C."""
    print_plain(
        console,
        f"Stopped. What is finished is in {folder}; the same command with --resume "
        f"--out {shlex.quote(str(folder))} does the rest.",
    )
