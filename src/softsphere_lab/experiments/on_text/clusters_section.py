"""The section of the experiments with clusters: beside softmax, and the sweep over clusters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from softsphere_lab.experiments.on_text import text_pictures as pictures
from softsphere_lab.experiments.on_text.setup_in_words import outputs_named, text_setup
from softsphere_lab.experiments.on_text.text_sections import (
    PERPLEXITY,
    VALID_NLL,
    seconds_an_epoch,
    table_beside_softmax,
)
from softsphere_lab.models.output_layers import Output
from softsphere_lab.report.measures import (
    REFERENCE,
    estimate,
    mean,
    note_on,
    number_cell,
    p_equation,
    p_values,
    ratio,
    with_note,
)
from softsphere_lab.report.paper import label
from softsphere_lab.report.results import Draw, Results, Section

__all__ = ["clusters_section"]

LEAF = "taylor_softmax"


def clusters_section(results: Results) -> Section:
    """Returns perplexities beside the better softmax, and clusters beside the other layers."""
    outputs = outputs_named(results.ends)
    softmax = _best(results, outputs, _is_softmax)
    reference = dict.fromkeys(outputs, softmax or REFERENCE)
    p = p_values(results.ends, PERPLEXITY, reference)
    table = table_beside_softmax(
        results,
        reference,
        p,
        first={"output layer": label},
        last={
            "validation": partial(_validation_cell, results),
            "seconds an epoch": partial(seconds_an_epoch, results),
        },
    )
    found = " ".join(
        [
            _beside_softmax(results, reference),
            *_which_softmax(outputs, softmax),
            *_beside_others(results, outputs),
        ]
    )
    return Section(
        text=f"{text_setup(results)}\n{with_note(table)}\n{found}\n",
        table=table,
        finding=found,
        note=note_on(table),
        pictures=_pictures(results, outputs, softmax),
    )


def _is_softmax(output: Output) -> bool:
    """Whether an output layer is softmax over all words."""
    return output.loss == REFERENCE and output.clusters is None


def _is_clustered(output: Output) -> bool:
    """Whether an output layer has log-Taylor softmax within several clusters by meaning."""
    return output.loss == LEAF and (output.clusters or 0) > 1 and output.by is None


# The kinds of layers that clusters by meaning are compared with besides softmax.
OTHERS: tuple[Callable[[Output], bool], ...] = (
    lambda output: output.loss == "adaptive_softmax",
    lambda output: output.loss == "sampled_softmax",
    lambda output: output.loss == LEAF and output.clusters is None,
    lambda output: output.loss == LEAF and output.clusters == 1,
    lambda output: output.loss == LEAF and output.by == "frequency",
    lambda output: output.loss == REFERENCE and output.clusters is not None,
)


def _best(
    results: Results, outputs: Mapping[str, Output], kind: Callable[[Output], bool]
) -> str | None:
    """Returns the name of that kind with the lowest validation loss, None if there is none.

    Only names with the most seeds of their kind are looked at.
    """
    known = {
        name: nll
        for name, output in outputs.items()
        if kind(output) and (nll := mean(results.ends[name], VALID_NLL)) is not None
    }
    most = max((len(results.ends[name]) for name in known), default=0)
    full = [name for name in known if len(results.ends[name]) == most]
    return min(full, key=known.__getitem__, default=None)


def _validation_cell(results: Results, name: str) -> str:
    """Returns the mean validation perplexity."""
    shown = replace(PERPLEXITY, key=VALID_NLL.key)
    middle, half = estimate(results.ends[name], shown)
    return number_cell(middle, half, shown.decimals(middle))


def _beside_softmax(results: Results, reference: Mapping[str, str]) -> str:
    """Returns a sentence with the ratios to softmax of the layers that have the most seeds."""
    most = max(map(len, results.ends.values()))
    parts = []
    for name, other in reference.items():
        found = None if name == other else ratio(results.ends, name, other, PERPLEXITY)
        if found is not None and len(results.ends[name]) == most:
            middle, low, high = found
            spread = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
            parts.append(f"{middle:.3f}{spread} with {label(name)}")
    if not parts:
        return "No output layer can be compared with softmax yet."
    return (
        "Test perplexity in times that of softmax, over the seeds that both have: "
        f"{'; '.join(parts)}."
    )


def _which_softmax(outputs: Mapping[str, Output], softmax: str | None) -> Iterable[str]:
    """Says which softmax is the reference, if there are several."""
    others = [name for name, output in outputs.items() if _is_softmax(output) and name != softmax]
    if softmax and others:
        yield f"The reference is {label(softmax)}, which is better on validation data."


def _beside_others(results: Results, outputs: Mapping[str, Output]) -> Iterable[str]:
    """Says how the best layer with clusters by meaning compares with the best of each kind."""
    best = _best(results, outputs, _is_clustered)
    if best is None:
        return
    others = [name for kind in OTHERS if (name := _best(results, outputs, kind)) is not None]
    # the p of a pair does not depend on which of both is the reference
    p = p_values(results.ends, PERPLEXITY, dict.fromkeys(others, best))
    parts = [
        f"{found[0]:.3f} times that of {label(name)}"
        + (f" ({p_equation(p[name])})" if name in p else "")
        for name in others
        if (found := ratio(results.ends, best, name, PERPLEXITY)) is not None
    ]
    if parts:
        yield (
            "Of the layers with log-Taylor softmax within clusters by meaning, "
            f"{label(best)} is best on validation data. "
            f"Its test perplexity is {'; '.join(parts)}."
        )


def _pictures(
    results: Results, outputs: Mapping[str, Output], softmax: str | None
) -> dict[str, Draw]:
    """Returns the curves of learning, and the sweep if the record has one."""
    drawn: dict[str, Draw] = {"curves": partial(pictures.learning_curves, results)}
    curves = [] if softmax is None else _sweep(results, outputs, softmax)
    if any(len(curve.x) > 2 for curve in curves):
        drawn["sweep"] = partial(_draw_sweep, curves, str(results.config["dataset"]))
    return drawn


def _sweep(results: Results, outputs: Mapping[str, Output], softmax: str) -> list[pictures.Curve]:
    """Returns the ratio to softmax by the number of clusters, a curve for each kind of cluster.

    Layers with one cluster are in the curves by meaning and by frequency alike.
    """
    shortlists = {output.shortlist for output in outputs.values() if output.clusters is not None}
    several = len(shortlists) > 1
    curves: dict[str, dict[int, tuple[float, float, float]]] = {}
    for name, output in outputs.items():
        found = ratio(results.ends, name, softmax, PERPLEXITY)
        if output.clusters is None or found is None:
            continue
        within = label(output.loss)
        if several:
            within += f", shortlist {output.shortlist}"
        if output.leaf_features is not None:
            within += f", leaves of width {output.leaf_features}"
        by = ("meaning", "frequency") if output.clusters == 1 else (output.by or "meaning",)
        for each in by:
            curves.setdefault(f"{within}, by {each}", {})[output.clusters] = found
    return [
        pictures.Curve(
            name,
            sorted(found),
            [found[C][0] for C in sorted(found)],
            [found[C][1:] for C in sorted(found)],
            {},
        )
        for name, found in curves.items()
    ]


def _draw_sweep(curves: list[pictures.Curve], dataset: str, path: Path) -> None:
    """Draws the perplexity in times softmax's against the number of clusters."""
    pictures.ratios_over(
        curves,
        "number of clusters",
        "test perplexity, in times softmax's",
        f"{dataset}: how many clusters, and made from what?",
        path,
    )
