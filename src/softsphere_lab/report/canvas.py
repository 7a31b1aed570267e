"""What all pictures have in common: styles, axes whose numbers can be read, captions, files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

from softsphere.whole_files import write_bytes

if TYPE_CHECKING:  # they take long to import
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "caption",
    "distinguishable",
    "drawable",
    "integers",
    "legend_below",
    "log_scale",
    "markers",
    "save",
    "tidy",
]

mpl.use("Agg")

SMALL = 9
# Leading digits of the numbers on a logarithmic axis, as many as there is room for.
DIGITS: tuple[tuple[float, ...], ...] = (
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    (1, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)
# A line of numbers with fewer than these says too little.
FEWEST_TICKS = 3


def distinguishable(count: int) -> list[tuple[float, ...]]:
    """Returns as many colours, all different."""
    for name in ("tab10", "tab20"):
        colours = mpl.colormaps[name](range(mpl.colormaps[name].N))
        if count <= len(colours):
            return [tuple(colour) for colour in colours[:count]]
    return [tuple(colour) for colour in mpl.colormaps["turbo"](np.linspace(0, 1, count))]


def markers(count: int) -> list[str]:
    """Returns as many markers; neighbours differ, so that shapes help where colours are alike."""
    return [("o", "s", "^", "D", "v", "P", "X")[i % 7] for i in range(count)]


def drawable(values: Sequence[float]) -> list[float]:
    """Returns the values with NaN, which leaves a gap, for those that are not finite."""
    return [value if math.isfinite(value) else math.nan for value in values]


def tidy(axes: Axes) -> None:
    """Gives axes a grid and no frame at the top and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def integers(axis: Axis) -> None:
    """Puts numbers at integers alone."""
    axis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))


def log_scale(axes: Axes, which: str) -> None:
    """Makes an axis logarithmic, with plain numbers that do not collide.

    To be called when everything else is drawn. It does nothing if there is nothing positive.

    which: "x" or "y".
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = (axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly).tolist()
    if not (math.isfinite(low) and math.isfinite(high) and low > 0):
        return
    axes.set(**{f"{which}scale": "log"})
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    ends = axes.get_xlim() if which == "x" else axes.get_ylim()
    points = (box.width if which == "x" else box.height) * 72 / figure.dpi
    ticks = log_ticks(*ends, points, horizontal=which == "x")
    axis.set_major_locator(mpl.ticker.FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: plain(value))
    axis.set_minor_locator(mpl.ticker.NullLocator())


def log_ticks(low: float, high: float, points: float, *, horizontal: bool) -> list[float]:
    """Returns round numbers from low to high whose labels fit side by side on a logarithmic axis.

    points: the length of the axis; the labels have the default size of letters.

    >>> log_ticks(90, 1100, 300, horizontal=True)
    [100, 200, 300, 500, 700, 1000]
    >>> log_ticks(5.6, 5.9, 300, horizontal=False)
    [5.6, 5.65, 5.7, 5.75, 5.8, 5.85, 5.9]
    """
    letters = float(mpl.rcParams["font.size"])

    def fit(ticks: Sequence[float]) -> bool:
        at = [math.log(tick / low) / math.log(high / low) * points for tick in ticks]
        sizes = [letters * (0.75 * len(plain(tick)) + 1 if horizontal else 1.5) for tick in ticks]
        return all(
            there - here >= (mine + other) / 2
            for (here, mine), (there, other) in pairwise(zip(at, sizes, strict=True))
        )

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [rounded(digit * 10.0**power) for power in decades for digit in digits] for digits in DIGITS
    ]
    choices += [[10.0**power for power in decades[::every]] for every in range(2, len(decades))]
    found = next(
        (ticks for every in choices if fit(ticks := [t for t in every if low <= t <= high])), []
    )
    if len(found) >= FEWEST_TICKS:
        return found
    for count in range(8, 1, -1):
        locator = mpl.ticker.MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])
        even = locator.tick_values(low, high)
        ticks = [rounded(tick) for tick in even if low <= rounded(tick) <= high and tick > 0]
        if fit(ticks) and len(ticks) > len(found):
            return ticks
    return found


def rounded(value: float) -> float:
    """Returns a number without the error of computing in binary, an integer where it is one."""
    value = float(f"{value:.10g}")
    return int(value) if value.is_integer() else value


def plain(value: float) -> str:
    """Returns a number as a person writes it.

    >>> plain(1000), plain(0.05), plain(10.0)
    ('1,000', '0.05', '10')
    """
    return f"{value:,.10g}" if value < 1e15 else f"{value:g}"


def legend_below(figure: Figure, columns: int, note: str = "", **entries: Any) -> None:
    """Puts the legend below all axes, where it covers no curve. note: stands over it."""
    figure.legend(
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
        title=note or None,
        title_fontsize=SMALL,
        **entries,
    )


def caption(figure: Figure, text: str) -> None:
    """Puts a sentence below all axes."""
    if text:
        figure.supxlabel(text, fontsize=SMALL)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture whole, and closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    plt.close(figure)
    write_bytes(path, buffer.getvalue())
