"""`softsphere report`: the page of results, tables and pictures from the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softsphere_lab.cli.arguments import folder
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.page import RECORDS, rebuild
from softsphere_lab.progress import terminal

__all__ = ["report"]


def report(
    records: Annotated[
        Path, typer.Option(parser=folder, metavar="FOLDER", help="Where the run folders are.")
    ] = RECORDS,
    docs: Annotated[
        Path, typer.Option(parser=folder, metavar="FOLDER", help="Where results.md goes.")
    ] = Path("docs"),
) -> None:
    """Rebuild docs/results.md, and all tables and pictures, from the records."""
    if not records.is_dir():
        raise LabError(f"--records {records}: there is no such folder; run `softsphere reproduce`")
    console = terminal()
    for path in rebuild(records, docs):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
