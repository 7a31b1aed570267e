"""The learning curves of losses, which the picture and the page of a comparison draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softsphere_lab.records.folder import Line
from softsphere_lab.report.summary import Row

__all__ = ["Curve", "curves_of"]


@dataclass(frozen=True)
class Curve:
    """Validation errors of a loss in per cent, by epoch: the mean over the seeds and the range."""

    name: str
    means: dict[int, float]
    lows: dict[int, float]
    highs: dict[int, float]


def curves_of(lines: Iterable[Line], rows: Sequence[Row]) -> list[Curve]:
    """Returns the curve of each row, from the lines of final runs; those of ends are passed over.

    A run that was cut off and done again counts once for each seed.
    """
    seen: dict[str, dict[int, dict[int, float]]] = {row.loss: {} for row in rows}
    for line in lines:
        if "epoch" in line and line["loss"] in seen and math.isfinite(line["valid_error"]):
            seeds = seen[line["loss"]].setdefault(line["epoch"], {})
            seeds[line["seed"]] = 100 * line["valid_error"]
    curves = []
    for row in rows:
        by_epoch = {epoch: [*seeds.values()] for epoch, seeds in sorted(seen[row.loss].items())}
        means = {epoch: sum(each) / len(each) for epoch, each in by_epoch.items()}
        lows = {epoch: min(each) for epoch, each in by_epoch.items()}
        highs = {epoch: max(each) for epoch, each in by_epoch.items()}
        curves.append(Curve(row.setting, means, lows, highs))
    return curves
