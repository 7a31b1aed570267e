"""`softsphere losses`: the losses that `--losses` knows, and the numbers that each takes."""

from __future__ import annotations

from dataclasses import MISSING, fields

from rich import box
from rich.table import Table

from softsphere import losses as library
from softsphere.losses import Loss, Spherical
from softsphere_lab.progress import print_plain, standard_console
from softsphere_lab.study.spec import AXES

__all__ = ["losses"]


def losses() -> None:
    """List the losses with the numbers that each takes, as --losses of compare has them."""
    console = standard_console()
    table = Table(box=box.SIMPLE)
    table.add_column("name", no_wrap=True)
    for title in ("numbers and their defaults", "--tune searches for", "spherical"):
        table.add_column(title)
    for name, kind in library.REGISTRY.items():
        spherical = "yes" if issubclass(kind, Spherical) else "no"
        table.add_row(name, _numbers_cell(kind), ", ".join(AXES.get(name, {})) or "–", spherical)
    console.print(table)
    print_plain(
        console,
        "A number is given after the name, as in `softsphere compare --losses "
        "softmax,z_loss:a=1:b=4`. Spherical losses alone can be trained without logits.",
    )


def _numbers_cell(kind: type[Loss]) -> str:
    """Returns the numbers of a loss with their defaults.

    >>> _numbers_cell(library.ZLoss), _numbers_cell(library.Softmax)
    ('a=1 b=4', '–')
    """
    parts = []
    for field in fields(kind):
        value = None if field.default is MISSING else field.default
        parts.append(field.name if value is None else f"{field.name}={value:g}")
    return " ".join(parts) or "–"
