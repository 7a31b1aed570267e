"""What the experiments on images share: the losses, the table, the picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from softsphere_lab.experiments.experiment import Ran, Section
from softsphere_lab.experiments.measures import (
    Metric,
    count,
    difference,
    mean,
    p_values,
    settings,
    shown,
    told,
)
from softsphere_lab.experiments.paper import REPORTED, label, reported
from softsphere_lab.records.folder import Line
from softsphere_lab.report import figures, summary
from softsphere_lab.report.grids import markdown
from softsphere_lab.report.inference import LEVEL
from softsphere_lab.report.summary import REFERENCE
from softsphere_lab.study.spec import LossSpec

__all__ = ["FEW", "LOSSES", "tell"]

LOSSES = tuple(
    map(
        LossSpec.parse,
        (
            "softmax",
            "taylor_softmax",
            "higher_taylor_softmax:order=4",
            "spherical_softmax",
            "z_loss",
            "squared_error",
            "bohning_bound",
            "bouchard_bound",
            "soft_margin_softmax",
            "soft_margin_softmax:order=2",
        ),
    )
)
FEW = LOSSES[:2]

ERROR = Metric("test_error", "test error %", 2, lambda share: 100 * share)
NLL = Metric("test_nll", "test NLL", 4)
SECONDS = Metric("seconds", "seconds", 0)


def setup(ran: Ran) -> str:
    """The images, the network and its training, in two sentences."""
    asked, data = ran.config, ran.config["data"]
    return (
        f"{data['train']:,} images to train and validate on, {data['test']:,} to test on. The "
        f"network `{asked['model']}`, batches of {asked['batch_size']}, {asked['epochs']} epochs; "
        f"{asked['trial_epochs']} in the search{ran.looked}.\n"
    )


def tell(ran: Ran) -> Section:
    """Errors and likelihoods beside the paper's, with tests against softmax."""
    reference = dict.fromkeys(ran.ends, REFERENCE)
    errors, nlls = (p_values(ran.ends, metric, reference) for metric in (ERROR, NLL))
    header = (
        "loss",
        "its numbers",
        "rate",
        "trials",
        "seeds",
        "paper's error %",
        ERROR.title,
        "p",
        NLL.title,
        "p",
        SECONDS.title,
    )
    rows = [
        (
            label(name),
            *settings(runs),
            ran.tried(name),
            count(runs),
            reported(str(ran.config["dataset"]), name),
            told(runs, ERROR),
            shown(errors.get(name)),
            told(runs, NLL),
            shown(nlls.get(name)),
            seconds(runs),
        )
        for name, runs in ran.ends.items()
    ]
    title = f"{ran.config['dataset']}, {ran.config['model']}, {ran.config['epochs']} epochs"
    table = markdown(header, rows)
    found = finding(ran, errors)
    return Section(
        text=f"{setup(ran)}\n{table}\n{found}\n",
        table=table,
        finding=found,
        pictures={"errors": partial(picture, ran, title)},
    )


def seconds(runs: Mapping[int, Line]) -> str:
    """Of training, on average."""
    taken = mean(runs, SECONDS)
    return "–" if taken is None else f"{taken:.0f}"


def finding(ran: Ran, p: Mapping[str, float]) -> str:
    """One sentence that says which losses were shown to differ from softmax in error."""
    softmax = mean(ran.ends[REFERENCE], ERROR) if REFERENCE in ran.ends else None
    if softmax is None:
        return "Softmax has no finished run, so nothing was tested."
    if not p:
        return "No loss was tested: that takes three seeds that softmax was run with too."
    clear: dict[str, list[str]] = {"Better": [], "Worse": []}
    for name, chance in p.items():
        error = mean(ran.ends[name], ERROR)
        if chance < LEVEL and error is not None:
            apart = difference(ran.ends, name, REFERENCE, ERROR)
            word = "Better" if apart < 0 else "Worse"
            clear[word].append(f"{label(name)} ({error:.2f} %, p {equals(chance)})")
    parts = [
        f"{word} than softmax ({softmax:.2f} %): {', '.join(names)}."
        for word, names in clear.items()
        if names
    ]
    rest = [label(name) for name, chance in p.items() if chance >= LEVEL]
    if rest:
        parts.append(f"Not shown to differ from softmax ({softmax:.2f} %): {', '.join(rest)}.")
    return " ".join([*parts, "Chance is that of the seeds: initialisation and order."])


def equals(p: float) -> str:
    """p after its sign."""
    return shown(p) if shown(p).startswith("<") else f"= {shown(p)}"


def picture(ran: Ran, title: str, path: Path) -> None:
    """Learning curves, and the errors of every seed."""
    lines = [*ran.epochs, *ran.lines]
    figures.comparison(
        lines,
        summary.summarise(lines, ran.trials),
        title,
        path,
        named=lambda row: label(row.loss),
        reported=REPORTED.get(ran.config["dataset"]),
    )
