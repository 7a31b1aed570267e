"""`softsphere report`: all pages and pictures, made from the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softsphere_lab.cli.arguments import folder
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.page import RECORDS, rebuild
from softsphere_lab.progress import print_plain, standard_console

__all__ = ["report"]


def report(
    records: Annotated[
        Path, typer.Option(parser=folder, metavar="FOLDER", help="Where the run folders are.")
    ] = RECORDS,
    docs: Annotated[
        Path, typer.Option(parser=folder, metavar="FOLDER", help="Where results.md goes.")
    ] = Path("docs"),
) -> None:
    """Make docs/results.md, and the README and pictures of every record, from the records."""
    if not records.is_dir():
        raise LabError(f"--records {records}: there is no such folder; run `softsphere reproduce`")
    console = standard_console()
    for path in rebuild(records, docs):
        print_plain(console, str(path))
