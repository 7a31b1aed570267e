"""Drawings of a page as SVG: learning curves, and the final error of every seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from softsphere_lab.report import canvas
from softsphere_lab.report.learning_curves import Curve
from softsphere_lab.report.summary import Row
from softsphere_lab.report.web_style import COLOURS

__all__ = ["draw_curves", "draw_seeds"]

HEIGHT, ROW = 340, 46
# The room around the axes.
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 26, 40
# The part of an axis that is left free at each end.
MARGIN = 0.06


@dataclass(frozen=True)
class _Scale:
    """Where a number lies on an axis from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        length = abs(self.end - self.start)
        if self.logarithmic:
            ticks = canvas.log_ticks(self.low, self.high, length, horizontal=False)
        else:
            ticks = [*MaxNLocator(5).tick_values(self.low, self.high)]
        return [canvas.rounded(tick) for tick in ticks if self.low <= tick <= self.high]


def draw_curves(curves: Sequence[Curve], width: int, kind: str) -> str:
    """Returns learning curves, with the range of the seeds behind each.

    kind: a class of the drawing, for the style sheet.
    """
    numbers = [x for curve in curves for x in (*curve.lows.values(), *curve.highs.values())]
    epochs = sorted({epoch for curve in curves for epoch in curve.means})
    if not numbers:
        return ""
    across = _Scale(epochs[0], epochs[-1], LEFT, width - RIGHT)
    up = _value_scale(numbers, HEIGHT - BOTTOM, TOP, shrinks=True)
    parts = [_horizontal_lines(up, width), *(_epoch_number(x, across) for x in _few(epochs, width))]
    parts += [_curve(i, curve, across, up) for i, curve in enumerate(curves)]
    best = min(curves, key=lambda curve: min(curve.means.values(), default=math.inf))
    least = min(best.means.values())
    words = (
        f"Learning curves of {', '.join(curve.name for curve in curves)}, {len(epochs)} epochs. "
        f"The lowest mean validation error is that of {best.name}, {least:.2f} %. The numbers of "
        "every epoch are in the table below."
    )
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(words)}" data-left="{LEFT}" data-right="{width - RIGHT}" '
        f'data-width="{width}">\n<text x="0" y="12">mean validation error, %</text>'
        f'<text x="{width - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">epoch</text>\n'
        + "\n".join(parts)
        + f'\n<line class="rule" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>\n</svg>'
    )


def _value_scale(numbers: Sequence[float], start: float, end: float, *, shrinks: bool) -> _Scale:
    """Returns an axis for all numbers; it is logarithmic where they are positive and it may be."""
    low, high = min(numbers), max(numbers)
    if shrinks and low > 0 and high > 2 * low:
        room = (high / low) ** MARGIN
        return _Scale(low / room, high * room, start, end, logarithmic=True)
    room = MARGIN * (high - low) or MARGIN * abs(high) or 1.0
    return _Scale(max(low - room, min(low, 0.0)), high + room, start, end)


def _few(epochs: Sequence[int], width: int) -> list[int]:
    """Returns round epochs among all, about one for every 80 pixels."""
    ticks = MaxNLocator(max(2, width // 80), integer=True).tick_values(epochs[0], epochs[-1])
    return [epoch for epoch in epochs if epoch in set(ticks)] or [epochs[0]]


def _horizontal_lines(up: _Scale, width: int) -> str:
    return "\n".join(
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{canvas.plain(tick)}</text>'
        for tick in up.ticks()
        for y in (up.place(tick),)
    )


def _epoch_number(epoch: int, across: _Scale) -> str:
    place = across.place(epoch)
    return f'<text x="{place}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{epoch}</text>'


def _curve(i: int, curve: Curve, across: _Scale, up: _Scale) -> str:
    """The range of the seeds, and the line of the mean."""

    def points(values: dict[int, float]) -> list[str]:
        return [f"{across.place(x)},{up.place(y)}" for x, y in values.items()]

    if not curve.means:
        return ""
    there, back = points(curve.highs), points(curve.lows)[::-1]
    middle = points(curve.means)
    dashes = ' stroke-dasharray="6 4"' if i >= COLOURS else ""
    colour = f"var(--c{i % COLOURS})"
    last = middle[-1].split(",")
    return (
        f'<g data-of="{i}">'
        f'<polygon class="range" fill="{colour}" points="{" ".join(there + back)}"/>'
        f'<polyline class="curve" stroke="{colour}"{dashes} points="{" ".join(middle)}"/>'
        f'<circle cx="{last[0]}" cy="{last[1]}" r="3" fill="{colour}"/></g>'
    )


def draw_seeds(rows: Sequence[Row], seeds: Sequence[Sequence[float]], width: int, kind: str) -> str:
    """Returns a line for each loss: its seeds, their mean, and the interval of the mean.

    seeds: the final test errors of each row in per cent, without runs that diverged.
    """
    numbers = [x for row, each in zip(rows, seeds, strict=True) for x in (*each, *_interval(row))]
    if not numbers:
        return ""
    height = ROW * len(rows) + BOTTOM
    across = _value_scale(numbers, 8, width - 8, shrinks=False)
    parts = []
    for tick in across.ticks():
        x = across.place(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{ROW * len(rows)}"/>')
        parts.append(
            f'<text x="{x}" y="{ROW * len(rows) + 16}" text-anchor="middle">'
            f"{canvas.plain(tick)}</text>"
        )
    for i, (row, each) in enumerate(zip(rows, seeds, strict=True)):
        parts.append(_seeds_of(i, row, each, across))
    words = "; ".join(f"{row.setting} {_in_words(row)}" for row in rows)
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"Test errors: {words}.")}">\n' + "\n".join(parts) + "\n"
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">test error, %</text>\n</svg>'
    )


def _interval(row: Row) -> tuple[float, ...]:
    half = 0.0 if math.isnan(row.error_half) else row.error_half
    return () if math.isnan(row.error) else (row.error - half, row.error, row.error + half)


def _in_words(row: Row) -> str:
    if math.isnan(row.error):
        return "has no run that did not diverge"
    return f"{row.error:.2f} %" + (f" ± {row.error_half:.2f}" if row.error_half >= 0 else "")


def _seeds_of(i: int, row: Row, seeds: Sequence[float], across: _Scale) -> str:
    """The line of one loss, whose name stands over it."""
    y, colour = ROW * i + 30, f"var(--c{i % COLOURS})"
    parts = [f'<text class="name" x="0" y="{y - 14}">{escape(row.setting)}</text>']
    parts += [
        f'<circle class="seed" cx="{across.place(x)}" cy="{y}" r="4" fill="{colour}"/>'
        for x in seeds
    ]
    if ends := _interval(row):
        low, middle, high = map(across.place, ends)
        parts.append(
            f'<line class="interval" stroke="{colour}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
            f'<path fill="{colour}" d="M{middle} {y - 8}l6 8-6 8-6-8z"/>'
        )
    return f"<g><title>{escape(f'{row.setting}: {_in_words(row)}')}</title>{''.join(parts)}</g>"
