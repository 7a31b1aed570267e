"""Bars whose totals never grow."""

from __future__ import annotations

import io

from rich.console import Console

from softsphere_lab.experiments.on_images.classification import RATES, Classification
from softsphere_lab.progress import Phases
from softsphere_lab.records.folder import Record
from softsphere_lab.study import work
from softsphere_lab.study.spec import LossSpec
from softsphere_lab.training.image_run import Schedule


def test_no_total_grows_while_a_search_goes_on(tmp_path, monkeypatch):
    study = Classification(
        dataset="digits",
        losses=(LossSpec.parse("softmax"), LossSpec.parse("spherical_softmax")),
        seeds=(0, 1),
        schedule=Schedule("mlp", 1, 512, "cpu"),
        rates=RATES,
        tune=True,
    )
    totals: dict[str, list[float | None]] = {"search": [], "final runs": []}

    class Seen(Phases):
        def show_finals(self, done: int, in_all: int) -> None:
            super().show_finals(done, in_all)
            for name, bar in (("search", self.search), ("final runs", self.final)):
                totals[name].append(self.progress.tasks[bar].total)

    monkeypatch.setattr(work, "Phases", Seen)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    record = Record.create(tmp_path / "r", study.config())
    work.work(study, study.load(), record, console)
    assert set(totals["final runs"]) == {4}
    # a search has no total until it is finished, and one that stays from then on
    (end,) = set(totals["search"]) - {None}
    first = totals["search"].index(end)
    assert first > 1
    assert totals["search"] == [None] * first + [end] * (len(totals["search"]) - first)


def test_a_study_without_a_search_has_one_bar():
    phases = Phases(Console(file=io.StringIO()), searches=False)
    assert phases.search is None and len(phases.progress.tasks) == 1
