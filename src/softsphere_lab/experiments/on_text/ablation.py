"""Whether depth, the exponential or batch normalisation closes the gap on Penn Treebank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_text import ptb
from softsphere_lab.experiments.on_text import text_pictures as pictures
from softsphere_lab.experiments.on_text.setup_in_words import outputs_named, text_setup
from softsphere_lab.experiments.on_text.text_sections import (
    PERPLEXITY,
    softmax_references,
    table_beside_softmax,
)
from softsphere_lab.models.output_layers import Output
from softsphere_lab.models.text_networks import ACTIVATIONS
from softsphere_lab.report.measures import (
    REFERENCE,
    note_on,
    p_values,
    ratio,
    shown_below,
    with_note,
)
from softsphere_lab.report.paper import label
from softsphere_lab.report.results import Results, Section
from softsphere_lab.study.search import Axis
from softsphere_lab.training.language_run import Setup

__all__ = ["EXPERIMENT"]

COMPARED = (REFERENCE, "taylor_softmax", "spherical_softmax")
DEPTHS = (1, 2, 3)


def _outputs_on_networks(losses: tuple[str, ...], depths: tuple[int, ...]) -> tuple[Output, ...]:
    """Returns an output layer for each loss on each network."""
    return tuple(
        Output(loss, depth=depth, activation=activation)
        for activation in ACTIVATIONS
        for depth in depths
        for loss in losses
    )


def ablation_section(results: Results) -> Section:
    """Returns the perplexities by network, each loss also as a multiple of softmax there."""
    outputs = outputs_named(results.ends)
    reference = softmax_references(outputs)
    p = p_values(results.ends, PERPLEXITY, reference)
    first = {
        "network": lambda name: _layers_counted(outputs[name]),
        "loss": lambda name: label(outputs[name].loss),
    }
    table = table_beside_softmax(results, reference, p, first)
    words = {name: _loss_and_network(output) for name, output in outputs.items()}
    found = _range_of_ratios(results, reference, p, words)
    return Section(
        text=f"{text_setup(results)}\n{with_note(table)}\n{found}\n",
        table=table,
        finding=found,
        note=note_on(table),
        pictures={"networks": partial(_draw_networks, results, outputs)},
    )


def _layers_counted(output: Output) -> str:
    """Returns the network in a few words.

    >>> _layers_counted(Output("softmax", depth=2, activation="exp"))
    '2 layers, exp'
    """
    depth = output.depth or 0
    return f"{depth} layer{'s' if depth > 1 else ''}, {output.activation}"


def _range_of_ratios(
    results: Results,
    reference: Mapping[str, str],
    p: Mapping[str, float],
    words: Mapping[str, str],
) -> str:
    """Returns sentences about the smallest and the largest ratio to softmax, and the tests.

    words: loss and network by the name of the output layer.
    """
    found = {
        name: compared[0]
        for name, other in reference.items()
        if name != other and (compared := ratio(results.ends, name, other, PERPLEXITY)) is not None
    }
    if not found:
        return "Nothing can be compared with softmax yet."
    least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)

    def ratio_where(name: str) -> str:
        return f"{found[name]:.3f} ({words[name]})"

    better = [name for name, value in found.items() if shown_below(p.get(name), value)]
    closed = (
        f"shown to be below softmax's on the same network: {', '.join(map(ratio_where, better))}"
        if better
        else "none was shown to be below softmax's on the same network"
    )
    untested = sum(name not in p for name in found)
    if untested:
        closed += f" ({untested} of {len(found)} not tested, with too few seeds)"
    sentences = (
        f"Over the networks the perplexity in times softmax's is from {ratio_where(least)} to "
        f"{ratio_where(most)}; {closed}."
    )
    lost = [words[name] for name, other in reference.items() if name not in {other, *found}]
    if lost:
        sentences += (
            f" Without a run to compare, since all diverged or none is done: {'; '.join(lost)}."
        )
    return sentences


def _loss_and_network(output: Output) -> str:
    """Returns the loss and its network in a few words.

    >>> _loss_and_network(Output("taylor_softmax", depth=2, activation="exp"))
    'log-Taylor softmax, exp, depth 2'
    """
    return f"{label(output.loss)}, {output.activation}, depth {output.depth}"


def _draw_networks(results: Results, outputs: Mapping[str, Output], path: Path) -> None:
    """Draws the perplexity by depth, a panel for each activation."""
    groups: dict[str, list[pictures.Curve]] = {}
    for activation in ACTIVATIONS:
        for loss in COMPARED:
            own = {
                outputs[name].depth or 0: runs
                for name, runs in results.ends.items()
                if outputs[name].loss == loss and outputs[name].activation == activation
            }
            if own:
                groups.setdefault(activation, []).append(
                    pictures.curve_over(label(loss), own, PERPLEXITY)
                )
    pictures.panels(
        groups,
        "hidden layers",
        "test perplexity",
        f"{results.config['dataset']}: depth and activation",
        path,
    )


FULL = replace(
    ptb.FULL,
    outputs=_outputs_on_networks(COMPARED, DEPTHS),
    seeds=(0, 1, 2),
)

EXPERIMENT = StudyReproduction(
    name="ablation",
    title="Depth, activation and normalisation",
    claim=(
        "Deeper networks, the exponential in place of ReLU, and batch normalisation do not close "
        "the gap between the spherical losses and softmax (arXiv:1511.05042)."
    ),
    differences=(
        "An n-gram model on Penn Treebank with Adam; the paper's networks could not be recovered, "
        "nor its numbers for this question."
    ),
    studies={
        "smoke": replace(
            FULL,
            dataset="generated",
            outputs=_outputs_on_networks(COMPARED[:2], (1, 2)),
            seeds=(0,),
            setup=Setup(embedding=8, hidden=16, width=16, batch_size=256, epochs=1),
            rates=Axis.fixed(1e-3),
        ),
        "small": replace(
            FULL,
            setup=replace(FULL.setup, train=200_000, epochs=2),
            trial_words=100_000,
        ),
        "full": FULL,
    },
    section_of=ablation_section,
)
