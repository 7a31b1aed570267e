"""What was measured over seeds: means with intervals, ratios, and tests paired with a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from softsphere_lab.records.folder import Line
from softsphere_lab.report.inference import FEWEST_PAIRS, LEVEL, holm, interval, paired_p

__all__ = [
    "REFERENCE",
    "Ends",
    "Metric",
    "difference",
    "estimate",
    "estimate_cell",
    "mean",
    "note_on",
    "number_cell",
    "p_cell",
    "p_equation",
    "p_values",
    "pairs",
    "ratio",
    "ratio_cell",
    "search_cells",
    "seeds_cell",
    "shown_below",
    "values",
    "with_note",
]

# The loss that all others are compared with.
REFERENCE = "softmax"
# A smaller p is not written out, so that none is printed as zero.
SMALLEST_P = 0.001
# What stands under a table of means over several seeds.
_NOTE = (
    "A number after ± is half of a 95 % interval (Student's t) of the mean over the seeds; p is of "
    "a paired t-test against softmax, after Holm's correction for all tests of its column."
)

# The ends of final runs, by name and then by seed.
Ends = Mapping[str, Mapping[int, Line]]


@dataclass(frozen=True)
class Metric:
    """A column of a table: the key of a number in the end of a run, and how it is shown.

    digits: decimals; there are more of them where a mean would have fewer significant digits than
    `figures`. shown: what is shown of the recorded number. Intervals are computed from what is
    shown, tests from what was recorded.
    """

    key: str
    title: str
    digits: int
    shown: Callable[[float], float] = lambda value: value
    figures: int = 0

    def decimals(self, value: float) -> int:
        """Returns the number of decimals for a mean.

        >>> perplexity = Metric("test_nll", "perplexity", 1, math.exp, figures=3)
        >>> [perplexity.decimals(x) for x in (0.0, 2.5, 25.0, 2500.0, math.inf)]
        [1, 2, 1, 1, 1]
        """
        if value == 0 or not math.isfinite(value):
            return self.digits
        return max(self.digits, self.figures - 1 - math.floor(math.log10(abs(value))))


def note_on(table: str) -> str:
    """Returns what the signs of a table mean, or nothing where all its rows have one seed.

    >>> note_on("| softmax | 0.70 ± 0.04 |")[:29], note_on("| softmax | 0.70 |")
    ('A number after ± is half of a', '')
    """
    return _NOTE if "±" in table else ""


def with_note(table: str) -> str:
    """Returns a table in Markdown, and under it what its signs mean."""
    return f"{table}\n{_NOTE}\n" if note_on(table) else table


def _recorded(runs: Mapping[int, Line], key: str) -> dict[int, float]:
    """Returns the recorded number of each seed.

    Runs that diverged are left out, because their last number is not what the loss converges to.
    """
    finals = {seed: line["final"] for seed, line in sorted(runs.items())}
    return {
        seed: final[key]
        for seed, final in finals.items()
        if not final["diverged"] and final[key] is not None
    }


def values(runs: Mapping[int, Line], metric: Metric) -> dict[int, float]:
    """Returns what is shown of each seed that has the metric and has not diverged."""
    return {seed: metric.shown(value) for seed, value in _recorded(runs, metric.key).items()}


def estimate(runs: Mapping[int, Line], metric: Metric) -> tuple[float, float]:
    """Returns the mean over the seeds and half of its 95 % interval, NaN where there is none."""
    return interval(list(values(runs, metric).values()))


def mean(runs: Mapping[int, Line], metric: Metric) -> float | None:
    """Returns the mean over the seeds, or None if no run has the metric."""
    known = list(values(runs, metric).values())
    return sum(known) / len(known) if known else None


def pairs(ends: Ends, name: str, other: str, key: str) -> list[tuple[float, float]]:
    """Returns the recorded numbers of both names for each seed that both have."""
    mine, others = (_recorded(ends.get(each, {}), key) for each in (name, other))
    return [(mine[seed], others[seed]) for seed in sorted(mine.keys() & others.keys())]


def p_values(ends: Ends, metric: Metric, reference: Mapping[str, str]) -> dict[str, float]:
    """Returns p of the paired test of each name against its reference, after Holm's correction.

    The recorded numbers are paired: log-likelihoods of two losses differ by about as much with a
    good seed as with a bad one, perplexities do not.

    reference: what each name is compared with. Names with too few pairs are left out.
    """
    raw: dict[str, float] = {}
    for name, other in reference.items():
        both = [] if name == other else pairs(ends, name, other, metric.key)
        if len(both) >= FEWEST_PAIRS:
            raw[name] = paired_p(*zip(*both, strict=True))
    return dict(zip(raw, holm(list(raw.values())), strict=True))


def difference(ends: Ends, name: str, other: str, metric: Metric) -> float | None:
    """Returns the mean difference over the seeds that both have, or None without such a seed."""
    both = [
        (metric.shown(mine), metric.shown(others))
        for mine, others in pairs(ends, name, other, metric.key)
    ]
    return sum(mine - others for mine, others in both) / len(both) if both else None


def ratio(ends: Ends, name: str, other: str, metric: Metric) -> tuple[float, float, float] | None:
    """Returns the geometric mean of the ratio over common seeds, and the ends of its interval.

    The ends are NaN with one seed. Returns None if no seed has both or a number is not finite.
    """
    logs = [
        math.log(metric.shown(mine)) - math.log(metric.shown(others))
        for mine, others in pairs(ends, name, other, metric.key)
    ]
    if not logs or not all(map(math.isfinite, logs)):
        return None
    middle, half = interval(logs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def shown_below(p: float | None, times: float) -> bool:
    """Returns whether a ratio to the reference was shown to be below 1 at the 5 % level."""
    return p is not None and p < LEVEL and times < 1


def number_cell(value: float, half: float, digits: int) -> str:
    """Returns a mean and half of its interval as a table has them, or a dash for NaN.

    >>> number_cell(1.234, 0.05, 2), number_cell(1.0, math.nan, 1), number_cell(math.nan, 0.0, 1)
    ('1.23 ± 0.05', '1.0', '–')
    """
    if math.isnan(value):
        return "–"
    spread = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    return f"{value:.{digits}f}{spread}"


def estimate_cell(runs: Mapping[int, Line], metric: Metric) -> str:
    """Returns the mean over the seeds and half of its interval as a table has them."""
    middle, half = estimate(runs, metric)
    return number_cell(middle, half, metric.decimals(middle))


def p_cell(p: float | None) -> str:
    """Returns p as a table has it.

    >>> p_cell(0.0123), p_cell(1e-9), p_cell(None)
    ('0.012', '< 0.001', '–')
    """
    if p is None:
        return "–"
    return f"< {SMALLEST_P}" if p < SMALLEST_P else f"{p:.3f}"


def p_equation(p: float) -> str:
    """Returns p as a sentence has it.

    >>> p_equation(0.0123), p_equation(1e-9)
    ('p = 0.012', 'p < 0.001')
    """
    return f"p {p_cell(p)}" if p < SMALLEST_P else f"p = {p_cell(p)}"


def ratio_cell(ends: Ends, name: str, other: str, metric: Metric) -> str:
    """Returns the ratio as a table has it: a dash for the reference and without a common seed."""
    found = None if name == other else ratio(ends, name, other, metric)
    return "–" if found is None else f"{found[0]:.3f}"


def search_cells(runs: Mapping[int, Line]) -> tuple[str, str]:
    """Returns the numbers that the search chose for a loss, and the learning rate."""
    some = next(iter(runs.values()))
    own = some["setting"].split()[0].split(":")[1:]
    rate = [word for word in some["setting"].split() if word.startswith("rate=")]
    return ", ".join(x.replace("=", " ") for x in (*own, *rate)) or "–", f"{some['lr']:g}"


def seeds_cell(runs: Mapping[int, Line]) -> str:
    """Returns how many seeds there are, and how many of their runs diverged."""
    diverged = sum(line["final"]["diverged"] for line in runs.values())
    return f"{len(runs)}" + (f" ({diverged} diverged)" if diverged else "")
