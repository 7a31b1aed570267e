"""Do depth, the exponential or batch normalisation close the gap on Penn Treebank?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from softsphere_lab.experiments import ptb
from softsphere_lab.experiments import text_pictures as pictures
from softsphere_lab.experiments.experiment import Ran, Section, StudyExperiment
from softsphere_lab.experiments.measures import (
    below,
    p_values,
    ratio,
)
from softsphere_lab.experiments.paper import label
from softsphere_lab.experiments.text_sections import PERPLEXITY, REFERENCE, beside_softmax, setup
from softsphere_lab.models.output_layers import Output
from softsphere_lab.study.search import Axis
from softsphere_lab.training.language import ACTIVATIONS
from softsphere_lab.training.language_run import Setup

__all__ = ["EXPERIMENT"]

COMPARED = (REFERENCE, "taylor_softmax", "spherical_softmax")
DEPTHS = (1, 2, 3)


def outputs(losses: tuple[str, ...], depths: tuple[int, ...]) -> tuple[Output, ...]:
    """Each loss on each network."""
    return tuple(
        Output(loss, depth=depth, activation=activation)
        for activation in ACTIVATIONS
        for depth in depths
        for loss in losses
    )


def network(name: str) -> tuple[str, int]:
    """The activation and the depth that a name says.

    >>> network("softmax depth=2 activation=exp")
    ('exp', 2)
    """
    output = Output.parse(name)
    return output.activation or "", output.depth or 0


def tell(ran: Ran) -> Section:
    """Perplexities by network, and each loss in times softmax there."""
    reference = {name: softmax_of(name) for name in ran.ends}
    p = p_values(ran.ends, PERPLEXITY, reference)
    columns = {"network": layers, "loss": lambda name: label(name.split()[0])}
    table = beside_softmax(ran, reference, p, columns)
    found = finding(ran, reference, p)
    return Section(
        text=f"{setup(ran)}\n{table}\n{found}\n",
        table=table,
        finding=found,
        pictures={"networks": partial(picture, ran)},
    )


def layers(name: str) -> str:
    """The network in a few words.

    >>> layers("softmax depth=2 activation=exp")
    '2 layers, exp'
    """
    activation, depth = network(name)
    return f"{depth} layer{'s' if depth > 1 else ''}, {activation}"


def softmax_of(name: str) -> str:
    """The softmax on the same network."""
    return " ".join([REFERENCE, *name.split()[1:]])


def finding(ran: Ran, reference: Mapping[str, str], p: Mapping[str, float]) -> str:
    """The range of the ratios, and where they are at their ends."""
    found = {
        name: compared[0]
        for name, other in reference.items()
        if name != other and (compared := ratio(ran.ends, name, other, PERPLEXITY)) is not None
    }
    if not found:
        return "Nothing can be compared with softmax yet."
    least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)

    def where(name: str) -> str:
        return f"{found[name]:.3f} ({place(name)})"

    better = [name for name, value in found.items() if below(p.get(name), value)]
    closed = (
        f"shown to be below softmax's on the same network: {', '.join(map(where, better))}"
        if better
        else "none was shown to be below softmax's on the same network"
    )
    untested = sum(name not in p for name in found)
    if untested:
        closed += f" ({untested} of {len(found)} not tested, with too few seeds)"
    lost = [place(name) for name, other in reference.items() if name not in {other, *found}]
    told = (
        f"Over the networks the perplexity in times softmax's is from {where(least)} to "
        f"{where(most)}; {closed}."
    )
    if lost:
        told += f" Without a run to compare, since all diverged or none is done: {'; '.join(lost)}."
    return told


def place(name: str) -> str:
    """The loss and its network.

    >>> place("taylor_softmax depth=2 activation=exp")
    'log-Taylor softmax, exp, depth 2'
    """
    activation, depth = network(name)
    return f"{label(name.split()[0])}, {activation}, depth {depth}"


def picture(ran: Ran, path: Path) -> None:
    """A panel an activation: perplexity by depth."""
    groups: dict[str, list[pictures.Line]] = {}
    for activation in ACTIVATIONS:
        for loss in COMPARED:
            own = {
                network(name)[1]: runs
                for name, runs in ran.ends.items()
                if name.split()[0] == loss and network(name)[0] == activation
            }
            if own:
                groups.setdefault(activation, []).append(
                    pictures.over(label(loss), own, PERPLEXITY)
                )
    pictures.panels(
        groups,
        "hidden layers",
        "test perplexity",
        f"{ran.config['dataset']}: depth and activation",
        path,
    )


FULL = replace(
    ptb.FULL,
    outputs=outputs(COMPARED, DEPTHS),
    seeds=(0, 1, 2),
)

EXPERIMENT = StudyExperiment(
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
            outputs=outputs(COMPARED[:2], (1, 2)),
            seeds=(0,),
            setup=Setup(embedding=8, hidden=16, width=16, batch_size=64, epochs=1),
            rates=Axis.fixed(1e-3),
        ),
        "small": replace(
            FULL,
            setup=replace(FULL.setup, train=200_000, epochs=2),
            trial_words=100_000,
        ),
        "full": FULL,
    },
    tell=tell,
)
