"""The learning rates with which an output layer trains about as well as with the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from softsphere_lab.report import canvas

__all__ = ["WITHIN", "Plateau", "draw_plateaus", "plateau_of"]

# A rate is on the plateau if it is at most this much worse than the best, as a share of the best.
WITHIN = 0.05
# Rates that are worse than this, as a multiple of the best, are drawn at the edge.
WORST = 2.0


@dataclass(frozen=True)
class Plateau:
    """The rates of one layer, how bad each was, and the range about the best that is as good.

    badness: by rate in ascending order, infinite where a run diverged; lower is better. best: the
    best rate. low, high: the ends of the plateau.
    """

    badness: Mapping[float, float]
    best: float
    low: float
    high: float

    @property
    def open_ends(self) -> list[str]:
        """Whether the best rate may lie "below" or "above" all that were tried."""
        rates = list(self.badness)
        below = ["below"] if self.best == rates[0] else []
        return [*below, "above"] if self.best == rates[-1] else below


def plateau_of(badness: Mapping[float, float]) -> Plateau | None:
    """Returns the plateau of a layer, or None if every run diverged.

    >>> found = plateau_of({0.01: 9.0, 0.1: 5.05, 1.0: 5.0, 10.0: math.inf})
    >>> found.best, found.low, found.high, found.open_ends
    (1.0, 0.1, 1.0, [])
    """
    rates = sorted(badness)
    ordered = {rate: badness[rate] for rate in rates}
    best = min(rates, key=ordered.__getitem__)
    if not math.isfinite(ordered[best]):
        return None
    place = low = high = rates.index(best)
    good = [ordered[rate] <= (1 + WITHIN) * ordered[best] for rate in rates]
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(rates) and good[high + 1]:
        high += 1
    return Plateau(ordered, rates[place], rates[low], rates[high])


def draw_plateaus(panels: Mapping[str, Mapping[str, Plateau]], path: Path) -> None:
    """Draws how bad each rate is beside the best of its layer.

    panels: the layers whose rates are of one kind, by what the axis of the rates is called.
    """
    import matplotlib.pyplot as plt

    names = [name for layers in panels.values() for name in layers]
    colours = dict(zip(names, canvas.distinguishable(len(names)), strict=True))
    shapes = dict(zip(names, canvas.markers(len(names)), strict=True))
    figure, drawn = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axes, (title, layers) in zip(drawn[0], panels.items(), strict=True):
        for name, found in layers.items():
            rates, heights = _heights(found)
            style = {"color": colours[name], "marker": shapes[name], "markersize": 5}
            axes.plot(rates, heights, label=name, **style)
            axes.plot([found.low, found.high], [1, 1], color=colours[name], linewidth=6, alpha=0.3)
        axes.axhline(1 + WITHIN, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=title, ylim=(0.97, WORST + 0.03))
        canvas.tidy(axes)
        canvas.log_scale(axes, "x")
    drawn[0][0].set_ylabel("validation perplexity or 1 / MRR,\nas a multiple of the layer's best")
    handles = [line for axes in drawn[0] for line in axes.get_lines() if line.get_label() in names]
    note = f"dotted: {1 + WITHIN:g}; thick: plateaus; {WORST:g} stands for {WORST:g} and more"
    canvas.legend_below(figure, 3, note, handles=handles)
    canvas.save(figure, path)


def _heights(found: Plateau) -> tuple[Sequence[float], Sequence[float]]:
    best = found.badness[found.best]
    return list(found.badness), [min(WORST, bad / best) for bad in found.badness.values()]
