"""What is said of recommenders."""

from __future__ import annotations

from softsphere_lab.experiments.on_items.gowalla import EXPERIMENT
from softsphere_lab.experiments.on_items.item_sections import item_section
from softsphere_lab.report.results import Results

DATA = {"users": 3, "items": 5, "train": 10, "valid": 2, "test": 4}


def results(recalls: dict[str, float], dataset: str = "gowalla", seeds: int = 3) -> Results:
    config = {**EXPERIMENT.studies["small"].config(), "data": DATA, "dataset": dataset}
    lines = []
    for place, (name, recall) in enumerate(recalls.items()):
        for seed in range(seeds):
            run = {"loss": name, "setting": name, "lr": 0.01, "seed": seed}
            value = recall + 0.0001 * seed + 0.00001 * (seed == place % 3)
            final = {"test_recall": value, "test_ndcg": 0.8 * value, "diverged": False}
            lines.append({**run, "epoch": 1, "seconds": 2.5})
            lines.append({**run, "final": final})
    return Results.of_lines(config, lines)


def test_the_best_layer_is_told_beside_the_published_numbers_that_are_larger():
    section = item_section(results({"softmax prior": 0.17, "taylor_softmax clusters=256": 0.18}))
    assert section.finding.startswith("The largest recall is that of log-Taylor softmax, 256 clus")
    assert "Recall@20 0.1801, NDCG@20 0.1441." in section.finding
    assert "Published with a larger recall" in section.finding
    assert section.finding.endswith("arXiv:2109.12613): SimpleX, MF-CCL.")
    row = next(x for x in section.table.splitlines() if x.startswith("| log-Taylor"))
    cells = [cell.strip() for cell in row.split("|")]
    # tested against softmax with the frequencies of the items
    assert cells[7] == "< 0.001"
    assert cells[9] == "2.5"
    assert "| *EASE, published* |" in section.table


def test_nothing_published_is_larger_or_known():
    best = item_section(results({"softmax prior": 0.2}))
    assert "No published recall of the table is larger" in best.finding
    other = item_section(results({"softmax prior": 0.2}, dataset="generated"))
    assert "ublished" not in other.finding and "published" not in other.table
