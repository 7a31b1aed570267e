"""The time of a training step against the number of classes, for every output layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from softsphere_lab.errors import LabError
from softsphere_lab.experiments.experiment import Prepared, Reproduction
from softsphere_lab.experiments.on_engines.scaling_picture import draw_step_times
from softsphere_lab.records.folder import Record
from softsphere_lab.report import grids as tables
from softsphere_lab.report.results import Section
from softsphere_lab.timing import processes as timing
from softsphere_lab.timing.clock import Effort, milliseconds
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED, LAYERS, obstacle

__all__ = ["EXPERIMENT", "METRICS", "PLANS", "Plan", "finding", "markdown", "measure"]

METRICS, LEFT_OUT = "metrics.jsonl", "left_out.jsonl"
Lines = list[dict[str, Any]]
# Times that differ by less than a tenth count as equal.
ALIKE = 1.1


@dataclass(frozen=True)
class Plan:
    """Which layers are timed at which settings, and for how many seconds each."""

    settings: tuple[Setting, ...]
    layers: tuple[str, ...]
    seconds: float

    def config(self) -> dict[str, Any]:
        """Returns the plan as a record has it, with lists for tuples."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return config


def _at(*classes: int, width: int = 128) -> tuple[Setting, ...]:
    return tuple(Setting(D, width, width) for D in classes)


PLANS = {
    "smoke": Plan(
        _at(1_000, 5_000, width=32), (FACTORED, "softmax", "hierarchical softmax"), seconds=0.2
    ),
    "small": Plan(_at(10_000, 100_000), tuple(LAYERS), seconds=3.0),
    "full": Plan(
        _at(10_000, 100_000, 1_000_000, 10_000_000), tuple(LAYERS), seconds=Effort.seconds
    ),
}


def measure(plan: Plan, record: Record, on_done: Callable[[str], None]) -> None:
    """Times what a record lacks, and adds each line to it at once.

    on_done: called with a sentence about each layer that was timed, or left out and why.
    """
    done = {(line["layer"], line["D"]) for line in record.lines(METRICS)}
    for setting in plan.settings:
        for name in plan.layers:
            if (name, setting.D) in done:
                continue
            where = f"{name}, D = {setting.D:,}"
            reason = obstacle(name, setting)
            if reason is not None:
                if (name, setting.D) not in left_out(record):
                    record.add(LEFT_OUT, [{"layer": name, "D": setting.D, "reason": reason}])
                on_done(f"{where}: left out, {reason}")
                continue
            seconds = timing.measure(name, setting, Effort(plan.seconds)).seconds
            record.add(METRICS, [{"layer": name, **asdict(setting), "seconds": seconds}])
            on_done(f"{where}: {milliseconds(seconds)} ms a step")


def left_out(record: Record) -> set[tuple[str, int]]:
    """Returns the layers and D that could not be timed on the machine of a record."""
    return {(line["layer"], line["D"]) for line in record.lines(LEFT_OUT)}


def _by_layer(lines: Lines) -> dict[str, dict[int, float]]:
    """The seconds of each layer by D, in ascending order."""
    found: dict[str, dict[int, float]] = {}
    # sorting by D alone keeps the order in which the layers were measured
    for line in sorted(lines, key=lambda line: line["D"]):
        found.setdefault(line["layer"], {})[line["D"]] = line["seconds"]
    return found


def markdown(lines: Lines) -> str:
    """Returns milliseconds by layer and D, and in brackets in multiples of the factored layer's."""
    times = _by_layer(lines)
    ours = times.get(FACTORED, {})
    classes = sorted({line["D"] for line in lines})

    def cell(name: str, D: int) -> str:
        seconds = times[name].get(D)
        if seconds is None:
            return "–"
        if name == FACTORED or D not in ours:
            return milliseconds(seconds)
        return f"{milliseconds(seconds)} ({_ratio(seconds / ours[D])})"

    rows = [[name, *(cell(name, D) for D in classes)] for name in times]
    head = "milliseconds a step (times the factored layer's)"
    return tables.markdown([head, *(f"D = {D:,}" for D in classes)], rows)


def finding(lines: Lines) -> str:
    """Returns how the factored layer's step grows with D, and which layers are slower or faster."""
    times = _by_layer(lines)
    ours = times.get(FACTORED, {})
    if not ours:
        return "The factored layer has not been measured."
    few, many = min(ours), max(ours)
    grown = (
        f"From {few:,} to {many:,} classes a step of the factored layer went from "
        f"{milliseconds(ours[few])} to {milliseconds(ours[many])} ms ({ours[many] / ours[few]:.2f} "
        "times)."
    )
    slower, faster, alike = [], [], []
    for name in times:
        ratios = {D: times[name][D] / ours[D] for D in times[name] if D in ours}
        if name == FACTORED or not ratios:
            continue
        above = [D for D in ratios if ratios[D] > ALIKE]
        below = [D for D in ratios if ratios[D] < 1 / ALIKE]
        if above:
            most = _ratio(max(ratios[D] for D in above))
            slower.append(f"{name} {_places(above, list(ratios))} (up to {most} times)")
        if below:
            most = _ratio(1 / min(ratios[D] for D in below))
            faster.append(f"{name} {_places(below, list(ratios))} (up to {most} times)")
        if not above and not below:
            alike.append(name)
    groups = {"Slower than it": slower, "Faster": faster, "As fast, within a tenth": alike}
    said = [f" {word}: {'; '.join(names)}." for word, names in groups.items() if names]
    return grown + "".join(said)


def _places(some: Sequence[int], every: Sequence[int]) -> str:
    """Some of every D in words; both ascend.

    >>> _places([5, 6], [5, 6]), _places([6, 7], [5, 6, 7]), _places([5, 7], [5, 6, 7])
    ('at every D', 'from D = 6 on', 'at D = 5 and D = 7')
    """
    if len(some) == len(every):
        return "at every D"
    if len(some) > 1 and list(some) == list(every[-len(some) :]):
        return f"from D = {some[0]:,} on"
    return "at " + " and ".join(f"D = {D:,}" for D in some)


def _ratio(times: float) -> str:
    """
    >>> _ratio(591.04), _ratio(3.46), _ratio(0.712)
    ('591', '3.5', '0.71')
    """
    return f"{times:,.0f}" if times >= 10 else f"{times:.2g}"


def picture(lines: Lines, left: Lines, path: Path) -> None:
    """Draws the step times. left: the lines of what could not be timed."""
    times = _by_layer(lines)
    reasons: dict[str, list[str]] = {}
    for line in left:
        if line["D"] not in times.get(line["layer"], {}):
            said = f"at D = {line['D']:,}, since {line['reason']}"
            reasons.setdefault(said, []).append(line["layer"])
    title = f"One step of an output layer, d = {lines[0]['d']}, m = {lines[0]['m']}, float32"
    draw_step_times(times, reasons, title, path)


class Scaling(Reproduction):
    """The experiment, in which layers are timed one after the other with all threads."""

    name = "scaling"
    timed = True
    title = "Seconds a step"
    claim = (
        "The exact step of a spherical loss costs nothing in the number of classes; at D = 793,471 "
        "and d = 512 it is some 258 times faster than the dense one (arXiv:1606.08061)."
    )
    differences = (
        "Here d and m are 128, so that ten million classes fit in memory. Targets are drawn as "
        "words are, hidden rows at random; everything is counted: forward, backward, update, "
        "mending. Sizes of the papers are in docs/costs.md. Softmax, core fused, is "
        "`torch.nn.functional.linear_cross_entropy`."
    )

    def prepare(self, budget: str, device: str, data_dir: Path | None) -> Prepared:
        if device != "cpu":
            raise LabError(
                f"--device must be cpu for scaling, got {device}; the layers are timed there"
            )
        if data_dir is not None:
            raise LabError("--data-dir has no meaning for scaling, whose rows are random")
        plan = PLANS[budget]

        def run(record: Record, console: Console, jobs: int) -> None:
            measure(plan, record, lambda said: console.print(said, markup=False, highlight=False))

        # times with another number of threads would not be comparable
        config = {
            "experiment": self.name,
            "budget": budget,
            **plan.config(),
            "threads": torch.get_num_threads(),
        }
        return Prepared(config, (), run)

    def unfinished(self, record: Record) -> str:
        plan = PLANS[(record.config() or {})["budget"]]
        done = {(line["layer"], line["D"]) for line in record.lines(METRICS)} | left_out(record)
        missing = [
            f"{name} at D = {setting.D:,}"
            for setting in plan.settings
            for name in plan.layers
            if (name, setting.D) not in done
        ]
        return f"not measured: {', '.join(missing)}" if missing else ""

    def section(self, record: Record) -> Section | None:
        lines = record.lines(METRICS)
        if not lines:
            return None
        table, found = markdown(lines), finding(lines)
        return Section(
            f"{table}\n{found}\n",
            table,
            found,
            pictures={"steps": partial(picture, lines, record.lines(LEFT_OUT))},
        )


EXPERIMENT = Scaling()
