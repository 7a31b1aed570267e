"""One text and one network with D classes, to see at which D the order of the losses turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_text import text_pictures as pictures
from softsphere_lab.experiments.on_text.language_modelling import LanguageModelling
from softsphere_lab.experiments.on_text.setup_in_words import outputs_named, text_setup
from softsphere_lab.experiments.on_text.text_sections import (
    PERPLEXITY,
    softmax_references,
    table_beside_softmax,
)
from softsphere_lab.models.output_layers import Output
from softsphere_lab.report.inference import LEVEL
from softsphere_lab.report.measures import REFERENCE, note_on, p_values, ratio, with_note
from softsphere_lab.report.paper import label
from softsphere_lab.report.results import Results, Section
from softsphere_lab.study.search import Axis
from softsphere_lab.training.language_run import Setup

__all__ = ["EXPERIMENT"]

CLASSES = (10, 100, 1_000, 3_000, 10_000, 30_000, 60_000)


def _outputs_with_classes(classes: tuple[int, ...]) -> tuple[Output, ...]:
    """Returns softmax and the spherical losses at each D, without and with the base measure."""
    return tuple(
        Output(loss, prior=prior, classes=D)
        for D in classes
        for prior in (False, True)
        for loss in (REFERENCE, "taylor_softmax", "spherical_softmax")
    )


def classes_section(results: Results) -> Section:
    """Returns the perplexities by D, each also as a multiple of softmax's."""
    outputs = outputs_named(results.ends)
    by_classes = dict(sorted(outputs.items(), key=lambda item: item[1].classes or 0))
    reference = softmax_references(by_classes)
    p = p_values(results.ends, PERPLEXITY, reference)
    first = {
        "D": lambda name: f"{outputs[name].classes:,}",
        "output layer": lambda name: label(str(_kind(outputs[name]))),
    }
    table = table_beside_softmax(results, reference, p, first)
    curves = _curves(results, outputs)
    found = _where_the_order_turns(curves, p)
    return Section(
        text=f"{text_setup(results)}\n{with_note(table)}\n{found}\n",
        table=table,
        finding=found,
        note=note_on(table),
        pictures={"ratios": partial(_draw_ratios, curves, results.config["dataset"])},
    )


def _kind(output: Output) -> Output:
    """Returns the output layer without its number of classes."""
    return replace(output, classes=None)


# The ratio to softmax with as many classes and the ends of its interval, by D.
Curve = dict[int, tuple[float, float, float]]


def _curves(results: Results, outputs: Mapping[str, Output]) -> dict[Output, Curve]:
    """Returns the curve of each kind of layer but softmax itself."""
    found: dict[Output, Curve] = {}
    for name, other in softmax_references(outputs).items():
        D, kind = outputs[name].classes, _kind(outputs[name])
        compared = ratio(results.ends, name, other, PERPLEXITY)
        if name != other and D is not None and compared is not None:
            found.setdefault(kind, {})[D] = compared
    return found


def _where_the_order_turns(curves: Mapping[Output, Curve], p: Mapping[str, float]) -> str:
    """Returns a list: for each kind of layer where its ratio to softmax is not 1."""
    lines = [_curve_sentence(kind, curve, p) for kind, curve in curves.items()]
    if not lines:
        return "Nothing can be compared yet."
    head = (
        "Test perplexity in times softmax's with as many classes; p is after Holm's correction for "
        "all comparisons of the table, the 95 % intervals are each for itself:"
    )
    return "\n".join([head, "", *lines])


def _curve_sentence(kind: Output, curve: Curve, p: Mapping[str, float]) -> str:
    """Returns the ratios with the fewest and most classes, and where they are shown not to be 1."""
    classes = sorted(curve)
    names = {D: str(replace(kind, classes=D)) for D in classes}

    def listed(what: str, some: list[int]) -> list[str]:
        return [f"{what} at {', '.join(f'{D:,}' for D in some)}"] if some else []

    ends = [f"{curve[classes[0]][0]:.3f} at {classes[0]:,} classes"]
    if len(classes) > 1:
        ends.append(f"{curve[classes[-1]][0]:.3f} at {classes[-1]:,}")
    parts = (
        " and ".join(ends),
        *listed("interval below 1", [D for D in classes if curve[D][2] < 1]),
        *listed("interval above 1", [D for D in classes if curve[D][1] > 1]),
        *listed(f"p < {LEVEL}", [D for D in classes if p.get(names[D], 1.0) < LEVEL]),
    )
    return f"- {label(str(kind))}: {'; '.join(parts)}."


def _draw_ratios(curves: Mapping[Output, Curve], dataset: str, path: Path) -> None:
    """Draws the ratio against D."""
    drawn = []
    for kind, curve in curves.items():
        x = sorted(curve)
        middle, ends = [curve[D][0] for D in x], [curve[D][1:] for D in x]
        drawn.append(pictures.Curve(label(str(kind)), x, middle, ends, {}))
    pictures.ratios_over(
        drawn,
        "classes D (the commonest words; all others are one)",
        "test perplexity, in times softmax's",
        f"{dataset}: where does the order turn?",
        path,
    )


FULL = LanguageModelling(
    dataset="wikipedia",
    outputs=_outputs_with_classes(CLASSES),
    seeds=(0, 1, 2),
    setup=Setup(
        embedding=32, hidden=128, width=64, batch_size=1024, epochs=2, train=2_000_000, held=50_000
    ),
    trial_epochs=1,
)

EXPERIMENT = StudyReproduction(
    name="classes",
    title="The number of classes",
    claim=(
        "With few classes the spherical losses are as good as softmax, with many they are worse; "
        "where the order turns, and why, the paper leaves open (arXiv:1511.05042)."
    ),
    differences=(
        "The paper compares different data sets instead. Here the text, the network and its input "
        "are the same, and only the number of words that are classes of their own changes. The "
        "classes are the commonest words of the whole text. At the budget small more than half of "
        "60,000 are never in the words trained on; the base measure counts each of those once. A "
        "trial reads a third of the words of a final run there; the rates about the best are then "
        "tried in runs of all words, ε is not."
    ),
    studies={
        "smoke": replace(
            FULL,
            dataset="generated",
            outputs=_outputs_with_classes((10, 100)),
            seeds=(0,),
            setup=Setup(embedding=8, hidden=16, width=16, batch_size=256, epochs=1),
            rates=Axis.fixed(3e-3),
        ),
        "small": replace(
            FULL,
            setup=replace(FULL.setup, train=600_000, held=20_000, epochs=1),
            trial_words=200_000,
            second_look=True,
        ),
        "full": FULL,
    },
    section_of=classes_section,
)
