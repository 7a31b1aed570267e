"""The section of an experiment with items: quality and cost of the layers, and published ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from softsphere_lab.experiments.on_items.item_pictures import quality_over_seconds
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
    search_cells,
    seeds_cell,
    with_note,
)
from softsphere_lab.report.paper import label
from softsphere_lab.report.results import Results, Section
from softsphere_lab.training.recommend_run import CUTOFF

__all__ = ["item_section"]

RECALL = Metric("test_recall", f"Recall@{CUTOFF}", 4)
NDCG = Metric("test_ndcg", f"NDCG@{CUTOFF}", 4)
# Published numbers on the same split: recall and discounted gain at 20, by data set.
SOURCE = "Mao et al. 2021, arXiv:2109.12613"
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "gowalla": {
        "SimpleX": (0.1872, 0.1557),
        "MF-CCL": (0.1837, 0.1493),
        "EASE": (0.1765, 0.1467),
        "YoutubeDNN, sampled softmax": (0.1754, 0.1473),
        "MF-BPR": (0.1627, 0.1378),
    }
}


def item_section(results: Results) -> Section:
    """Returns a table of quality and seconds, and a sentence about the best layer."""
    table, found = _table(results), _best_beside_published(results)
    return Section(
        text=f"{_setup_in_words(results)}\n\n{with_note(table)}\n{found}\n",
        table=table,
        finding=found,
        note=note_on(table),
        pictures={"recall": partial(_draw_recall, results)},
    )


def _draw_recall(results: Results, path: Path) -> None:
    """Draws the recall against the seconds of an epoch."""
    points = {}
    for name, runs in results.ends.items():
        recall, seconds = mean(runs, RECALL), _mean_seconds(results, name)
        if recall is not None and seconds is not None:
            points[name] = seconds, recall
    title = f"{results.config['dataset']}: what an epoch costs, and what all of them yield"
    quality_over_seconds(points, RECALL.title, title, path)


def _table(results: Results) -> str:
    """Returns the output layers, and below them the published numbers."""
    softmax = next((name for name in results.ends if _is_softmax(name)), REFERENCE)
    p = p_values(results.ends, RECALL, dict.fromkeys(results.ends, softmax))
    rows = [
        (
            label(name),
            *search_cells(runs),
            str(results.trials_of(name)),
            seeds_cell(runs),
            estimate_cell(runs, RECALL),
            p_cell(p.get(name)),
            estimate_cell(runs, NDCG),
            _seconds(results, name),
        )
        for name, runs in results.ends.items()
    ]
    rows += [
        (f"*{name}, published*", "–", "–", "–", "–", f"{recall:.4f}", "–", f"{ndcg:.4f}", "–")
        for name, (recall, ndcg) in _published(results).items()
    ]
    titles = ("its numbers", "rate", "trials", "seeds", RECALL.title, "p", NDCG.title)
    return markdown(("output layer", *titles, "seconds an epoch"), rows)


def _is_softmax(name: str) -> bool:
    output = Output.parse(name)
    return output.loss == REFERENCE and output.clusters is None


def _published(results: Results) -> dict[str, tuple[float, float]]:
    return PUBLISHED.get(str(results.config["dataset"]), {})


def _seconds(results: Results, name: str) -> str:
    seconds = _mean_seconds(results, name)
    return "–" if seconds is None else f"{seconds:.1f}"


def _mean_seconds(results: Results, name: str) -> float | None:
    """Returns the mean over all epochs of all seeds."""
    own = [line["seconds"] for line in results.epochs if line["loss"] == name]
    return sum(own) / len(own) if own else None


def _setup_in_words(results: Results) -> str:
    """Returns sentences about the interactions, the network and the training."""
    asked: Line = results.config
    data = asked["data"]
    return (
        f"{data['users']:,} users and {data['items']:,} items, with {data['train']:,} pairs to "
        f"train on, {data['valid']:,} to validate on and {data['test']:,} to test on. In each step "
        f"the network reads {100 * asked['read']:g} % of the items of {asked['batch_size']} users, "
        "chosen anew each time, and the output layer predicts the others. A hidden state is the "
        f"sum of {asked['width']} numbers for each item, scaled to length {asked['length']:g}, "
        f"with dropout {asked['dropout']:g}. Rows of the output weights that AdamW steps are cut "
        f"to a norm of at most {asked['longest']:g}. The search trains on the training "
        f"part for {asked['trial_epochs']} epochs{results.second_look}; final runs train on the "
        f"training and validation parts for {asked['epochs']} epochs, and the items of both are "
        "left out of what they recommend."
    )


def _best_beside_published(results: Results) -> str:
    """Returns which layer has the largest recall, and which published methods have a larger one."""
    recalls = {name: mean(runs, RECALL) for name, runs in results.ends.items()}
    known = {name: recall for name, recall in recalls.items() if recall is not None}
    if not known:
        return "No output layer can be compared yet."
    best = max(known, key=known.__getitem__)
    ndcg = mean(results.ends[best], NDCG)
    told = (
        f"The largest recall is that of {label(best)}: Recall@{CUTOFF} {known[best]:.4f}, "
        f"NDCG@{CUTOFF} {ndcg:.4f}."
    )
    published = _published(results)
    if not published:
        return told
    above = [name for name, (recall, _) in published.items() if recall > known[best]]
    return (
        f"{told} Published with a larger recall ({SOURCE}): {', '.join(above)}."
        if above
        else f"{told} No published recall of the table is larger ({SOURCE})."
    )
