"""What the sections of the experiments on text share: metrics, tables, sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from softsphere_lab.experiments.on_text import text_pictures as pictures
from softsphere_lab.experiments.on_text.setup_in_words import outputs_named, text_setup
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.folder import Line
from softsphere_lab.report.grids import markdown
from softsphere_lab.report.measures import (
    REFERENCE,
    Metric,
    estimate_cell,
    mean,
    note_on,
    p_cell,
    p_values,
    ratio,
    ratio_cell,
    search_cells,
    seeds_cell,
    with_note,
)
from softsphere_lab.report.paper import label, reported_cell
from softsphere_lab.report.results import Results, Section
from softsphere_lab.training.text_parts import MOST_NLL, perplexity

__all__ = [
    "MRR",
    "PERPLEXITY",
    "VALID_NLL",
    "goals",
    "ratios_to_softmax",
    "seconds_an_epoch",
    "seconds_to_goal",
    "softmax_on_same_network",
    "softmax_references",
    "table_beside_softmax",
    "text_section",
]

PERPLEXITY = Metric("test_nll", "test perplexity", 1, perplexity, figures=3)
TOP1 = Metric("test_top1", "top-1 %", 2, lambda share: 100 * share)
TOP10 = Metric("test_top10", "top-10 %", 2, lambda share: 100 * share)
MRR = Metric("test_mrr", "MRR", 4)
SIMLEX = Metric("simlex999", "SimLex-999", 3)
WORDSIM = Metric("wordsim353", "WordSim-353", 3)
VALID_NLL = Metric("valid_nll", "", 1)


def softmax_on_same_network(output: Output) -> Output:
    """Returns the softmax that an output layer is compared with: the same network and classes.

    >>> str(softmax_on_same_network(Output("taylor_softmax", prior=True, factored=True, lstm=True)))
    'softmax lstm'
    """
    network = {name: getattr(output, name) for name in ("lstm", "depth", "activation", "classes")}
    return Output(REFERENCE, **network)


def softmax_references(outputs: Mapping[str, Output]) -> dict[str, str]:
    """Returns for each name that of the softmax that it is compared with."""
    return {name: str(softmax_on_same_network(output)) for name, output in outputs.items()}


def text_section(results: Results) -> Section:
    """Returns tables of quality and cost, with tests of perplexity and rank against softmax."""
    reference = softmax_references(outputs_named(results.ends))
    quality = _quality_table(results, reference)
    cost = _cost_table(results)
    found = ratios_to_softmax(results, reference)
    return Section(
        text=(
            f"{text_setup(results)}\n{with_note(quality)}\n{_pairs_covered(results)}\n\n{cost}\n"
            f"{found}\n"
        ),
        table=quality,
        finding=found,
        note=note_on(quality),
        pictures={"curves": partial(pictures.learning_curves, results)},
    )


def _quality_table(results: Results, reference: Mapping[str, str]) -> str:
    """Returns a table of perplexities, ranks and correlations of each output layer."""
    perplexity_p, rank_p = (
        p_values(results.ends, metric, reference) for metric in (PERPLEXITY, MRR)
    )
    dataset = str(results.config["dataset"])
    columns: list[tuple[str, Callable[[str, Mapping[int, Line]], str]]] = [
        ("output layer", lambda name, _: label(name)),
        ("its numbers", lambda _, runs: search_cells(runs)[0]),
        ("rate", lambda _, runs: search_cells(runs)[1]),
        ("trials", lambda name, _: str(results.trials_of(name))),
        ("seeds", lambda _, runs: seeds_cell(runs)),
        ("paper's perplexity", lambda name, _: reported_cell(dataset, name)),
        (PERPLEXITY.title, lambda _, runs: estimate_cell(runs, PERPLEXITY)),
        ("p", lambda name, _: p_cell(perplexity_p.get(name))),
        (TOP1.title, lambda _, runs: estimate_cell(runs, TOP1)),
        (TOP10.title, lambda _, runs: estimate_cell(runs, TOP10)),
        (MRR.title, lambda _, runs: estimate_cell(runs, MRR)),
        ("p", lambda name, _: p_cell(rank_p.get(name))),
        (SIMLEX.title, lambda _, runs: estimate_cell(runs, SIMLEX)),
        (WORDSIM.title, lambda _, runs: estimate_cell(runs, WORDSIM)),
    ]
    return markdown(
        [title for title, _ in columns],
        [[cell(name, runs) for _, cell in columns] for name, runs in results.ends.items()],
    )


def _cost_table(results: Results) -> str:
    """Returns a table of the seconds that each output layer took."""
    aims = goals(results)
    titles = (f"seconds to validation perplexity {goal}" for goal in aims)
    return markdown(
        ("output layer", "computed by", "seconds an epoch", *titles),
        [
            (
                label(name),
                _engines_of(runs),
                seconds_an_epoch(results, name),
                *(seconds_to_goal(results, name, goal) for goal in aims),
            )
            for name, runs in results.ends.items()
        ],
    )


def table_beside_softmax(
    results: Results,
    reference: Mapping[str, str],
    p: Mapping[str, float],
    first: Mapping[str, Callable[[str], str]],
    last: Mapping[str, Callable[[str], str]] | None = None,
) -> str:
    """Returns a table of perplexities, each also as a multiple of softmax's.

    reference: the softmax that each name is compared with. first, last: the first and the last
    columns, by title, each a function of the name.
    """
    last = last or {}
    ends = results.ends
    header = ("its numbers", "rate", "trials", "seeds", PERPLEXITY.title, "times softmax", "p")
    return markdown(
        (*first, *header, *last),
        [
            (
                *(cell(name) for cell in first.values()),
                *search_cells(ends[name]),
                str(results.trials_of(name)),
                seeds_cell(ends[name]),
                estimate_cell(ends[name], PERPLEXITY),
                ratio_cell(ends, name, other, PERPLEXITY),
                p_cell(p.get(name)),
                *(cell(name) for cell in last.values()),
            )
            for name, other in reference.items()
        ],
    )


def _engines_of(runs: Mapping[int, Line]) -> str:
    """Returns how the layer was computed, as the runs recorded it."""
    return ", ".join(sorted({line["final"]["engine"] for line in runs.values()}))


def _pairs_covered(results: Results) -> str:
    """Returns a sentence about the pairs of words that the correlations are computed from."""
    final = next(iter(results.lines))["final"]
    return (
        f"Correlations are of {final['simlex999_pairs']} pairs of SimLex-999 and "
        f"{final['wordsim353_pairs']} of WordSim-353 whose words the vocabulary has."
    )


def seconds_an_epoch(results: Results, name: str) -> str:
    """Returns the mean over all epochs of all seeds."""
    own = [line["seconds"] for line in results.epochs if line["loss"] == name]
    return f"{sum(own) / len(own):.1f}" if own else "–"


def goals(results: Results) -> list[int]:
    """Returns validation perplexities that all output layers reach and that half of them reach.

    They are rounded up to tens. Returns none if no layer has a perplexity.
    """
    nlls = [mean(runs, VALID_NLL) for runs in results.ends.values()]
    ends = sorted(math.exp(nll) for nll in nlls if nll is not None and nll < MOST_NLL)
    if not ends:
        return []
    found = (10 * math.ceil(end / 10) for end in (ends[-1], ends[(len(ends) - 1) // 2]))
    return list(dict.fromkeys(found))


def seconds_to_goal(results: Results, name: str, goal: float) -> str:
    """Returns the seconds of training until a validation perplexity, as a mean over the seeds.

    Between two epochs the log of the perplexity is taken to be linear in time. The cell is a dash
    if a seed does not reach the goal, and says "at most" if one reaches it in its first epoch.
    """
    taken, in_first_epoch = [], False
    for seed in results.ends[name]:
        own = [line for line in results.epochs if (line["loss"], line["seed"]) == (name, seed)]
        passed, before = 0.0, None
        for line in sorted(own, key=lambda line: line["epoch"]):
            nll, seconds = line["valid_nll"], line["seconds"]
            if nll is None:
                return "–"
            if nll <= math.log(goal):
                in_first_epoch |= before is None
                share = 1.0 if before is None else (before - math.log(goal)) / (before - nll)
                taken.append(passed + share * seconds)
                break
            passed, before = passed + seconds, nll
        else:
            return "–"
    return f"{'≤ ' if in_first_epoch else ''}{sum(taken) / len(taken):.0f}" if taken else "–"


def ratios_to_softmax(results: Results, reference: Mapping[str, str]) -> str:
    """Returns a sentence with each perplexity as a multiple of softmax's."""
    parts = []
    for name, other in reference.items():
        compared = None if name == other else ratio(results.ends, name, other, PERPLEXITY)
        if compared is not None:
            middle, low, high = compared
            spread = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
            parts.append(f"{label(name)} {middle:.3f}{spread}")
    if not parts:
        return "No output layer can be compared with softmax yet."
    return (
        "Test perplexity in times that of softmax on the same network, with 95 % intervals over "
        f"the seeds: {'; '.join(parts)}."
    )
