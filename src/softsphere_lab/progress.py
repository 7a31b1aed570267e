"""What a long run shows while it works, and when it is stopped."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["bars", "tell_stopped", "terminal"]


def terminal() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def bars(console: Console) -> Progress:
    """Bars on a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def tell_stopped(console: Console, folder: Path) -> None:
    """How to go on after a Ctrl-C."""
    console.print(
        f"Stopped. What is finished is in {folder}; the same command with --resume "
        f"--out {shlex.quote(str(folder))} does the rest.",
        markup=False,
        soft_wrap=True,
    )
