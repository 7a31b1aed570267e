"""The experiment of `softsphere tune`: the learning rates of output layers, and their plateaus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from softsphere_lab.errors import LabError
from softsphere_lab.experiments.experiment import Experiment, Prepared, prepare_study
from softsphere_lab.experiments.on_text.language_modelling import RATES, LanguageModelling
from softsphere_lab.models.output_layers import Output, layer
from softsphere_lab.records.folder import Line, Record
from softsphere_lab.report.grids import markdown
from softsphere_lab.report.paper import label
from softsphere_lab.report.plateau import WITHIN, Plateau, draw_plateaus, plateau_of
from softsphere_lab.report.results import Results, Section
from softsphere_lab.study.search import Axis, Space
from softsphere_lab.training.text_parts import perplexity

__all__ = ["RATE_FINDER", "RateFinder", "RateSweep"]

HEADER = ("output layer", "best rate", "plateau", "AdamW below", "perplexity", "MRR", "diverged")
NOTE = (
    f"The plateau has the rates about the best that are at most {100 * WITHIN:g} % worse in "
    "validation perplexity, or in 1 / MRR for a loss without probabilities. Rates of factored "
    "layers are multiples of the number of classes D; FactoredSGD steps these layers, and AdamW "
    "steps the network below them with one rate. AdamW steps all of the other models."
)


@dataclass(frozen=True)
class RateSweep(LanguageModelling):
    """Each output layer with each of its rates, as runs that never read the test part.

    A factored layer has each of `layer_rates`, while AdamW steps the network below it with
    `rate_below`. Any other layer has each of `rates`, with which AdamW steps the whole model. A
    record may get more layers, rates and seeds when it is resumed.
    """

    rate_below: float = RATES.start

    tested: ClassVar[str] = "valid_mrr"
    reads_test: ClassVar[bool] = False
    shorter: ClassVar[str] = "fewer --words"

    def config(self) -> Line:
        whole = super().config()
        del whole["search"]  # nothing is searched for, and the names of the runs have their rates
        return {**whole, "rate_below": self.rate_below}

    @property
    def by_name(self) -> dict[str, Output]:
        return {name: output for name, (output, _) in self._points().items()}

    def _points(self) -> dict[str, tuple[Output, float]]:
        """Returns each output layer at each rate, and the learning rate of AdamW."""
        points = {}
        for output in self.outputs:
            if output.factored:
                for rate in self.layer_rates.values:
                    placed = output.at({"rate": rate})
                    points[str(placed)] = placed, self.rate_below
            else:
                for rate in self.rates.values:
                    points[f"{output} lr={rate!r}"] = output, rate
        return points

    def space(self, name: str) -> Space:
        return Space({"lr": Axis.fixed(self._points()[name][1])})

    def setting(self, name: str, values: dict[str, float]) -> tuple[str, float]:
        return str(self._points()[name][0]), values["lr"]


class RateFinder(Experiment):
    """Tries all rates of some output layers, and tells the plateau of each."""

    name = "tune"
    title = "Learning rates of output layers"

    def prepare(self, study: RateSweep) -> Prepared:
        """Loads the text. Raises LabError if it cannot be had, or if a rate was given already."""
        for output in study.outputs:
            if output.rate is not None:
                raise LabError(f"--output {output}: leave rate= out, since rates are tried")
        data = study.load()
        for output in study.outputs:
            _check_layer(output, data.text.counts)
        return prepare_study(study, data, experiment=self.name)

    def unfinished(self, record: Record) -> str:
        config = record.config() or {}
        runs = len(config["outputs"]) * len(config["seeds"])
        done = len(Results.of_record(RateSweep, record).lines)
        return f"{done} of {runs} runs are finished" if done < runs else ""

    def section(self, record: Record) -> Section | None:
        results = Results.of_record(RateSweep, record)
        layers = _by_layer(results)
        if not layers:
            return None
        classes = int(results.config["data"]["words"])
        found = {name: plateau_of(_badness(ends)) for name, ends in layers.items()}
        below = float(results.config["rate_below"])
        rows = [_table_row(name, layers[name], found[name], below) for name in layers]
        table = markdown(HEADER, rows)
        told = " ".join(_sentence(name, found[name], below, classes) for name in layers)
        panels = _panels(found, below)
        pictures = {"plateaus": partial(draw_plateaus, panels)} if panels else {}
        text = f"{table}\n{NOTE}\n\n{told}\n"
        return Section(text=text, table=table, finding=told, note=NOTE, pictures=pictures)


def _check_layer(output: Output, counts: Tensor) -> None:
    """Raises LabError if no such layer can be made for these words."""
    if output.clusters is not None:
        return
    try:
        layer(output.at({"rate": 1.0}) if output.factored else output, 2, counts, "cpu")
    except (TypeError, ValueError) as error:
        raise LabError(f"--output {output}: {error}") from error


def _by_layer(results: Results) -> dict[str, dict[float, list[Line]]]:
    """Returns the ends of runs by output layer and then by rate."""
    layers: dict[str, dict[float, list[Line]]] = {}
    for line in results.lines:
        output = Output.parse(line["setting"])
        rate = line["lr"] if output.rate is None else output.rate
        name = str(replace(output, rate=None))
        layers.setdefault(name, {}).setdefault(rate, []).append(line["final"])
    return layers


def _badness(ends: Mapping[float, list[Line]]) -> dict[float, float]:
    """Returns how bad each rate is: the mean over the seeds, infinite if one of them diverged."""
    return {rate: sum(map(_run_badness, finals)) / len(finals) for rate, finals in ends.items()}


def _run_badness(final: Line) -> float:
    if final["diverged"] or (final["valid_nll"] is None and final["valid_mrr"] <= 0):
        return math.inf
    nll = final["valid_nll"]
    return 1 / final["valid_mrr"] if nll is None else perplexity(nll)


def _table_row(
    name: str, ends: Mapping[float, list[Line]], found: Plateau | None, below: float
) -> tuple[str, ...]:
    diverged = sum(final["diverged"] for finals in ends.values() for final in finals)
    lower = f"{below:g}" if Output.parse(name).factored else "–"
    if found is None:
        return label(name), "–", "–", lower, "–", "–", str(diverged)
    best = ends[found.best]
    nll = best[0]["valid_nll"]
    mrr = sum(final["valid_mrr"] for final in best) / len(best)
    likely = "–" if nll is None else f"{found.badness[found.best]:.1f}"
    reach = f"{found.low:g} to {found.high:g}" if found.low < found.high else f"{found.low:g}"
    return label(name), f"{found.best:g}", reach, lower, likely, f"{mrr:.4f}", str(diverged)


def _panels(found: Mapping[str, Plateau | None], below: float) -> dict[str, dict[str, Plateau]]:
    """Returns the layers by what the axis of their rates is called."""
    panels: dict[str, dict[str, Plateau]] = {}
    for name, plateau in found.items():
        if plateau is not None:
            own = f"rate of FactoredSGD / D, with {below:g} for AdamW below"
            title = own if Output.parse(name).factored else "rate of AdamW"
            panels.setdefault(title, {})[label(name)] = plateau
    return panels


def _sentence(name: str, found: Plateau | None, below: float, classes: int) -> str:
    """Returns what to do about the rate of a layer. below: AdamW's rate under a factored layer.

    >>> found = plateau_of({0.01: 5.0, 0.1: 7.0})
    >>> _sentence("softmax", found, 0.003, 340)
    'softmax: begin with 0.01; a lower rate was not tried and may be better.'
    >>> found = plateau_of({0.001: 5.01, 0.01: 5.0, 0.1: 7.0})
    >>> _sentence("softmax", found, 0.003, 340).partition("; ")[2].partition(":")[0]
    'the lowest rate that was tried is about as good'
    """
    factored = Output.parse(name).factored
    if found is None:
        lower = f"lower rates, here or below it, where AdamW had {below:g}"
        return f"{label(name)}: every run diverged; try {lower if factored else 'lower rates'}."
    rate = f"{found.best:g}"
    if factored:
        rate += f" · D, which is lr={found.best * classes:g} with D = {classes:,}, if AdamW has "
        rate += f"{below:g} below it"
    ends = {"below": "lower", "above": "higher"}
    beyond = " or ".join(ends[each] for each in found.open_ends)
    more = f"; a {beyond} rate was not tried and may be better" if beyond else ""
    if not beyond and found.low == min(found.badness):
        lower = "--layer-rates" if factored else "--rates"
        more = (
            "; the lowest rate that was tried is about as good: with more --words or --epochs, or "
            f"lower {lower}, they may be told apart"
        )
    return f"{label(name)}: begin with {rate}{more}."


RATE_FINDER = RateFinder()
