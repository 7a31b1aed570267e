"""A comparison of losses that a user asks for, on one set of images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from softsphere_lab.experiments.experiment import Experiment, Prepared, prepare_study
from softsphere_lab.experiments.on_images.classification import Classification
from softsphere_lab.records.folder import Record
from softsphere_lab.report import figures, summary
from softsphere_lab.report.measures import note_on, with_note
from softsphere_lab.report.results import Results, Section
from softsphere_lab.report.summary import Row
from softsphere_lab.report.web_page import comparison_page

__all__ = ["COMPARISON", "Comparison"]


class Comparison(Experiment):
    """The experiment of `softsphere compare`."""

    name = "compare"
    title = "Losses compared"

    def prepare(self, study: Classification) -> Prepared:
        """Loads the images. Raises LabError if they cannot be had or do not suit the network."""
        images = study.load()
        study.check_network(images)
        return prepare_study(study, images, experiment=self.name)

    def unfinished(self, record: Record) -> str:
        config = record.config() or {}
        runs = len(config["losses"]) * len(config["seeds"])
        done = len(Results.of_record(Classification, record).lines)
        return f"{done} of {runs} final runs are finished" if done < runs else ""

    def section(self, record: Record) -> Section | None:
        results = Results.of_record(Classification, record)
        rows = summary.summarise(results)
        if not rows:
            return None
        table = summary.markdown_table(rows, summary.columns_with_differences(rows))
        found = summary.finding(rows)
        return Section(
            text=f"{with_note(table)}\n{found}\n",
            table=table,
            finding=found,
            note=note_on(table),
            pictures={"comparison": partial(_draw_comparison, results, rows)},
            csv=summary.csv_text(rows),
        )

    def web_page(self, record: Record) -> str | None:
        """Returns the section of a record as a page for a browser, or None of an empty record."""
        results = Results.of_record(Classification, record)
        rows = summary.summarise(results)
        if not rows:
            return None
        environment = record.environments()
        return comparison_page(results, rows, environment, self.unfinished(record))


def _draw_comparison(results: Results, rows: list[Row], path: Path) -> None:
    """Draws learning curves, and the errors of every seed."""
    asked = results.config
    title = f"{asked['dataset']}, {asked['model']}, {asked['epochs']} epochs"
    figures.comparison([*results.epochs, *results.lines], rows, title, path)


COMPARISON = Comparison()
