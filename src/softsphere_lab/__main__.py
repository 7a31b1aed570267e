"""The `softsphere` command, which needs what the extra [lab] installs."""

from __future__ import annotations

import sys

# The modules that the command imports, and the packages that have them. The extra [lab] installs
# these and what public sets alone need: pyarrow and pillow for a folder, `datasets` for the hub.
LAB = {name: name for name in ("matplotlib", "rich", "scipy", "typer")}
LAB["sklearn"] = "scikit-learn"


def main() -> int:
    """Runs the command line and returns the exit code."""
    try:
        # imported here, so that an interrupt meanwhile ends in one line too
        from softsphere_lab.ctrl_c import leaving_at_once

        with leaving_at_once():
            return _command()
    except KeyboardInterrupt:
        print("softsphere: stopped", file=sys.stderr)
        return 130


def _command() -> int:
    """Imports what the command needs, which takes seconds, and runs it."""
    import importlib.util
    import io

    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show ± should show the rest of a table
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    missing = [LAB[name] for name in LAB if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"softsphere: the command needs {', '.join(missing)}; pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    return _run_command_line()


def _run_command_line() -> int:
    """Imports the command line and runs it."""
    from softsphere_lab.cli.app import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
