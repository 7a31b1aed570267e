"""Finished runs made by hand, as the records of the lab have them."""

from __future__ import annotations

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.registry import REPRODUCTIONS
from softsphere_lab.report.results import Results

STUDIES = {
    name: experiment
    for name, experiment in REPRODUCTIONS.items()
    if isinstance(experiment, StudyReproduction)
}
# The reproductions on text whose outputs are layers with losses.
ON_TEXT = ("ptb", "wikipedia", "ablation", "classes", "clusters", "clusters_wikipedia",
           "clusters_lstm")  # fmt: skip
DATA = {"words": 10, "train": 100, "test": 50}


def text_end(loss: str, seed: int, nll: float, **more) -> dict:
    """The end of a run on text."""
    final = {
        "engine": "gram",
        "best_epoch": 1,
        "valid_nll": nll,
        "valid_mrr": 0.1,
        "test_nll": nll,
        "test_top1": 0.1,
        "test_top10": 0.2,
        "test_mrr": 0.15,
        "simlex999": 0.1,
        "simlex999_pairs": 7,
        "wordsim353": None,
        "wordsim353_pairs": 2,
        "seconds": 3.0,
        "diverged": False,
        **more,
    }
    return {"loss": loss, "setting": loss, "lr": 0.01, "seed": seed, "final": final}


def image_end(loss: str, seed: int, error: float, **more) -> dict:
    """The end of a run on images."""
    final = {
        "best_epoch": 1,
        "valid_error": error,
        "mean_valid_error": error,
        "test_error": error,
        "test_nll": None,
        "seconds": 1.0,
        "diverged": False,
        **more,
    }
    return {"loss": loss, "setting": loss, "lr": 0.01, "seed": seed, "final": final}


def results_of(ends: list[dict], each_epoch: list[dict] = (), **config) -> Results:
    """Results with these ends and epochs; the configuration is that of a small study on text."""
    asked = {**STUDIES["ptb"].studies["small"].config(), "data": DATA, "model": "lenet", **config}
    return Results.of_lines(asked, [*ends, *each_epoch])
