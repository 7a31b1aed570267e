"""Tables of what was measured over seeds: means, intervals, and tests paired with a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from softsphere_lab.records.folder import Line
from softsphere_lab.report.inference import FEWEST_PAIRS, LEVEL, holm, interval, paired_p
from softsphere_lab.report.summary import probability

__all__ = [
    "Ends",
    "Metric",
    "below",
    "count",
    "difference",
    "mean",
    "p_values",
    "ratio",
    "settings",
    "shown",
    "times",
    "told",
    "values",
]

# Ends of final runs: by name, then by seed.
Ends = Mapping[str, Mapping[int, Line]]


@dataclass(frozen=True)
class Metric:
    """A column: where it is in the end of a run, and how it is shown.

    digits: decimals, more where a mean would else have fewer significant figures. of: what is shown
    of it. Intervals are of what is shown, tests of what the record has.
    """

    key: str
    title: str
    digits: int
    of: Callable[[float], float] = lambda value: value
    figures: int = 0

    def decimals(self, value: float) -> int:
        """
        >>> perplexity = Metric("test_nll", "perplexity", 1, math.exp, figures=3)
        >>> [perplexity.decimals(x) for x in (0.0, 2.5, 25.0, 2500.0, math.inf)]
        [1, 2, 1, 1, 1]
        """
        if value == 0 or not math.isfinite(value):
            return self.digits
        return max(self.digits, self.figures - 1 - math.floor(math.log10(abs(value))))


def values(runs: Mapping[int, Line], metric: Metric) -> dict[int, float]:
    """What each seed has of a metric, of those that have it and have not diverged.

    What a run that diverged ends with is not what its loss comes to.
    """
    ends = {seed: line["final"] for seed, line in sorted(runs.items())}
    found = {seed: end[metric.key] for seed, end in ends.items() if not end["diverged"]}
    return {seed: metric.of(value) for seed, value in found.items() if value is not None}


def told(runs: Mapping[int, Line], metric: Metric) -> str:
    """Mean and half of its 95 % interval; a dash where the metric means nothing."""
    known = list(values(runs, metric).values())
    if not known:
        return "–"
    middle, half = interval(known)
    digits = metric.decimals(middle)
    spread = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    return f"{middle:.{digits}f}{spread}"


def mean(runs: Mapping[int, Line], metric: Metric) -> float | None:
    """Over the seeds, None where no run has the metric."""
    known = list(values(runs, metric).values())
    return sum(known) / len(known) if known else None


def p_values(ends: Ends, metric: Metric, reference: Mapping[str, str]) -> dict[str, float]:
    """p of the paired test of each name against its reference, Holm's correction over all of them.

    Paired are the record's values: log-likelihoods differ by as much for a good seed and a bad.

    reference: what each name is compared with. Names with too few pairs are left out.
    """
    raw: dict[str, float] = {}
    for name, other in reference.items():
        if name == other or name not in ends or other not in ends:
            continue
        plain = Metric(metric.key, metric.title, metric.digits)
        mine, others = values(ends[name], plain), values(ends[other], plain)
        seeds = sorted(set(mine) & set(others))
        if len(seeds) >= FEWEST_PAIRS:
            raw[name] = paired_p([mine[s] for s in seeds], [others[s] for s in seeds])
    return dict(zip(raw, holm(list(raw.values())), strict=True))


def difference(ends: Ends, name: str, other: str, metric: Metric) -> float:
    """How much larger than another's a metric is, by the mean over common seeds; nan without any.

    p is of the same pairs.
    """
    mine, others = values(ends[name], metric), values(ends[other], metric)
    seeds = set(mine) & set(others)
    return sum(mine[s] - others[s] for s in seeds) / len(seeds) if seeds else math.nan


def shown(p: float | None) -> str:
    """p as a table has it."""
    return "–" if p is None else probability(p)


def ratio(ends: Ends, name: str, other: str, metric: Metric) -> tuple[float, float, float] | None:
    """How many times another's a metric is: geometric mean over common seeds, and its interval.

    The ends of the interval are nan with one seed. None where no seed has both.
    """
    if name not in ends or other not in ends:
        return None
    mine, others = values(ends[name], metric), values(ends[other], metric)
    logs = [math.log(mine[s]) - math.log(others[s]) for s in sorted(set(mine) & set(others))]
    if not logs or not all(map(math.isfinite, logs)):
        return None
    middle, half = interval(logs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def times(ends: Ends, name: str, other: str, metric: Metric) -> str:
    """The ratio as a table has it; a dash for the reference itself, and without a common seed."""
    found = None if name == other else ratio(ends, name, other, metric)
    return "–" if found is None else f"{found[0]:.3f}"


def settings(runs: Mapping[int, Line]) -> tuple[str, str]:
    """The numbers that the search chose for a loss, and the learning rate."""
    some = next(iter(runs.values()))
    own = some["setting"].split()[0].split(":")[1:]
    rate = [word for word in some["setting"].split() if word.startswith("rate=")]
    return ", ".join(x.replace("=", " ") for x in (*own, *rate)) or "–", f"{some['lr']:g}"


def count(runs: Mapping[int, Line]) -> str:
    """How many seeds, and how many of them diverged."""
    diverged = sum(line["final"]["diverged"] for line in runs.values())
    return f"{len(runs)}" + (f" ({diverged} diverged)" if diverged else "")


def below(p: float | None, times: float) -> bool:
    """Whether a ratio to the reference was shown to be below 1, at 5 %."""
    return p is not None and p < LEVEL and times < 1
