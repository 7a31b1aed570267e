"""Why and where does the order turn? One text and network, and the words told apart cut to D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from softsphere_lab.experiments import text_pictures as pictures
from softsphere_lab.experiments.experiment import Ran, Section, StudyExperiment
from softsphere_lab.experiments.language_modelling import LanguageModelling
from softsphere_lab.experiments.measures import p_values, ratio
from softsphere_lab.experiments.paper import label
from softsphere_lab.experiments.text_sections import PERPLEXITY, REFERENCE, beside_softmax, setup
from softsphere_lab.models.output_layers import Output
from softsphere_lab.report.inference import LEVEL
from softsphere_lab.study.search import Axis
from softsphere_lab.training.language_run import Setup

__all__ = ["EXPERIMENT"]

CLASSES = (10, 100, 1_000, 3_000, 10_000, 30_000, 60_000)


def outputs(classes: tuple[int, ...]) -> tuple[Output, ...]:
    """Softmax and the spherical losses, without and with the base measure, at each D."""
    return tuple(
        Output(loss, prior=prior, classes=D)
        for D in classes
        for prior in (False, True)
        for loss in (REFERENCE, "taylor_softmax", "spherical_softmax")
    )


def kind_of(name: str) -> str:
    """The output layer without its number of classes.

    >>> kind_of("taylor_softmax prior classes=10")
    'taylor_softmax prior'
    """
    return str(replace(Output.parse(name), classes=None))


def tell(ran: Ran) -> Section:
    """Perplexities and their ratio to softmax's by D."""
    names = sorted(ran.ends, key=lambda name: Output.parse(name).classes or 0)
    reference = {name: softmax_of(name) for name in names}
    p = p_values(ran.ends, PERPLEXITY, reference)
    columns = {
        "D": lambda name: f"{Output.parse(name).classes:,}",
        "output layer": lambda name: label(kind_of(name)),
    }
    table = beside_softmax(ran, reference, p, columns)
    found_out = finding(ran, p)
    return Section(
        text=f"{setup(ran)}\n{table}\n{found_out}\n",
        table=table,
        finding=found_out,
        pictures={"ratios": partial(picture, ran)},
    )


def softmax_of(name: str) -> str:
    """Softmax with as many classes."""
    return str(Output(REFERENCE, classes=Output.parse(name).classes))


def curves(ran: Ran) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Of each kind of layer, by D: perplexity in times softmax's, and its interval."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for name in ran.ends:
        D, kind = Output.parse(name).classes, kind_of(name)
        compared = ratio(ran.ends, name, softmax_of(name), PERPLEXITY)
        if kind != REFERENCE and D is not None and compared is not None:
            found.setdefault(kind, {})[D] = compared
    return found


def finding(ran: Ran, p: Mapping[str, float]) -> str:
    """Of each kind: the ratio with the fewest and most classes, and where it is not 1."""

    def at(what: str, classes: list[int]) -> list[str]:
        return [f"{what} at {', '.join(f'{D:,}' for D in classes)}"] if classes else []

    lines = []
    for kind, by_classes in curves(ran).items():
        classes = sorted(by_classes)
        names = {D: str(replace(Output.parse(kind), classes=D)) for D in classes}
        middle = {D: f"{by_classes[D][0]:.3f}" for D in classes}
        ends = [f"{middle[classes[0]]} at {classes[0]:,} classes"]
        if len(classes) > 1:
            ends.append(f"{middle[classes[-1]]} at {classes[-1]:,}")
        said = (
            " and ".join(ends),
            *at("interval below 1", [D for D in classes if by_classes[D][2] < 1]),
            *at("interval above 1", [D for D in classes if by_classes[D][1] > 1]),
            *at(f"p < {LEVEL}", [D for D in classes if p.get(names[D], 1.0) < LEVEL]),
        )
        lines.append(f"- {label(kind)}: {'; '.join(said)}.")
    if not lines:
        return "Nothing can be compared yet."
    head = (
        "Test perplexity in times softmax's with as many classes; p is after Holm's correction for "
        "all comparisons of the table, the 95 % intervals are each for itself:"
    )
    return "\n".join([head, "", *lines])


def picture(ran: Ran, path: Path) -> None:
    """The ratio against D."""
    drawn: list[pictures.Line] = []
    for kind, by_classes in curves(ran).items():
        x = sorted(by_classes)
        y = [by_classes[D][0] for D in x]
        drawn.append((label(kind), x, y, [by_classes[D][1:] for D in x]))
    pictures.lines(
        drawn,
        "classes D (the commonest words; all others are one)",
        "test perplexity, in times softmax's",
        f"{ran.config['dataset']}: where does the order turn?",
        path,
    )


FULL = LanguageModelling(
    dataset="wikipedia",
    outputs=outputs(CLASSES),
    seeds=(0, 1, 2),
    setup=Setup(
        embedding=32, hidden=128, width=64, batch_size=1024, epochs=2, train=2_000_000, held=50_000
    ),
    trial_epochs=1,
)

EXPERIMENT = StudyExperiment(
    name="classes",
    title="The number of classes",
    claim=(
        "With few classes the spherical losses are as good as softmax, with many they are worse; "
        "where the order turns, and why, the paper leaves open (arXiv:1511.05042)."
    ),
    differences=(
        "None of the paper's: it compares different data sets. Here the text, the network and what "
        "it reads are the same, and only the number of words that are told apart changes. The "
        "classes are the commonest words of the whole text, so that at the budget small many of "
        "them, more than half of 60,000, are never in the words trained on; the base measure "
        "counts each of those once. There a run of the search reads a third of the words of a "
        "final one; the rates about the best are then tried in runs of all words, ε is not."
    ),
    studies={
        "smoke": replace(
            FULL,
            dataset="generated",
            outputs=outputs((10, 100)),
            seeds=(0,),
            setup=Setup(embedding=8, hidden=16, width=16, batch_size=64, epochs=1),
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
    tell=tell,
)
