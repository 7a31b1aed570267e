"""The section of an experiment on images: its losses, table, sentences and picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from softsphere_lab.report import figures, summary
from softsphere_lab.report.measures import note_on, p_cell, search_cells, seeds_cell, with_note
from softsphere_lab.report.paper import REPORTED, label, reported_cell
from softsphere_lab.report.results import Results, Section
from softsphere_lab.report.summary import ERROR, NLL, SECONDS, Column, Row
from softsphere_lab.study.spec import LossSpec

__all__ = ["FEW", "LOSSES", "image_section"]

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


def image_section(results: Results) -> Section:
    """Returns errors and likelihoods beside the paper's, with tests against softmax."""
    rows = summary.summarise(results)
    table = summary.markdown_table(rows, _image_columns(results))
    found = summary.finding(rows, label)
    return Section(
        text=f"{_images_and_network(results)}\n{with_note(table)}\n{found}\n",
        table=table,
        finding=found,
        note=note_on(table),
        pictures={"errors": partial(_draw_errors, results, rows)},
    )


def _images_and_network(results: Results) -> str:
    """Returns sentences about the images, the network and its training."""
    asked, data = results.config, results.config["data"]
    return (
        f"{data['train']:,} images to train and validate on, {data['test']:,} to test on. The "
        f"network `{asked['model']}`, batches of {asked['batch_size']}, {asked['epochs']} epochs; "
        f"{asked['trial_epochs']} in the search{results.second_look}.\n"
    )


def _image_columns(results: Results) -> list[Column]:
    """Returns the columns, with what the paper reports among them."""
    ends, dataset = results.ends, str(results.config["dataset"])

    return [
        ("loss", lambda row: label(row.loss)),
        ("its numbers", lambda row: search_cells(ends[row.loss])[0]),
        ("rate", lambda row: search_cells(ends[row.loss])[1]),
        ("trials", lambda row: str(row.trials)),
        ("seeds", lambda row: seeds_cell(ends[row.loss])),
        ("paper's error %", lambda row: reported_cell(dataset, row.loss)),
        (ERROR.title, summary.error_cell),
        ("p", lambda row: p_cell(row.p)),
        (NLL.title, summary.nll_cell),
        ("p", lambda row: p_cell(row.nll_p)),
        (SECONDS.title, summary.seconds_cell),
    ]


def _draw_errors(results: Results, rows: list[Row], path: Path) -> None:
    """Draws learning curves, and the errors of every seed."""
    asked = results.config
    figures.comparison(
        [*results.epochs, *results.lines],
        rows,
        f"{asked['dataset']}, {asked['model']}, {asked['epochs']} epochs",
        path,
        named=lambda row: label(row.loss),
        reported=REPORTED.get(asked["dataset"]),
    )
