"""The `softsphere` command: the lab's, where the lab is installed."""

from __future__ import annotations

import importlib.util
import io
import sys

# What the extra [lab] brings.
LAB = ("datasets", "matplotlib", "rich", "scipy", "sklearn", "typer")


def main() -> int:
    """Runs the command line. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal without ± is no reason to lose the table
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return command()
    except KeyboardInterrupt:
        print("softsphere: stopped", file=sys.stderr)
        return 130


def command() -> int:
    """Imports what the command needs, which takes seconds, and runs it."""
    missing = [name for name in LAB if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"softsphere: the command needs {', '.join(missing)}; pip install 'softsphere[lab]'",
            file=sys.stderr,
        )
        return 2
    from softsphere_lab.cli.app import main as lab_main

    return lab_main()


if __name__ == "__main__":
    sys.exit(main())
