"""`softsphere report`: the page of results, tables and pictures from the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softsphere.lab.errors import LabError
from softsphere.lab.options import folder
from softsphere.lab.progress import terminal
from softsphere.lab.reproduce.report import RECORDS, rebuild

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
