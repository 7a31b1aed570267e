"""Learning curves: which lines count, their means and ranges, and that the picture has them."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pytest

from softsphere_lab.report import figures
from softsphere_lab.report.learning_curves import curves_of
from softsphere_lab.report.results import Results
from softsphere_lab.report.summary import Row, summarise


def epoch(loss: str, seed: int, number: int, error: float) -> dict:
    return {"loss": loss, "setting": f"{loss}:b=2", "seed": seed, "epoch": number,
            "valid_error": error}  # fmt: skip


def end(loss: str) -> dict:
    final = {"test_error": 0.1, "test_nll": None, "seconds": 1.0, "diverged": False}
    return {"loss": loss, "setting": f"{loss}:b=2", "lr": 0.1, "seed": 0, "final": final}


@pytest.fixture
def rows() -> list[Row]:
    return summarise(Results.of_lines({}, [end("softmax"), end("z_loss")]))


LINES = [
    epoch("z_loss", 0, 2, 0.2),
    epoch("softmax", 0, 1, 0.9),  # the run was cut off after this line, and done again
    epoch("softmax", 0, 1, 0.5),
    epoch("softmax", 1, 1, 0.25),
    epoch("softmax", 0, 2, 0.25),
    epoch("softmax", 1, 2, math.nan),
    epoch("squared_error", 0, 1, 0.7),
    end("softmax"),
]


def test_each_seed_counts_once_and_numbers_that_are_not_finite_do_not(rows):
    softmax, z_loss = curves_of(LINES, rows)
    assert (softmax.name, z_loss.name) == ("softmax:b=2", "z_loss:b=2")
    assert (softmax.means, softmax.lows, softmax.highs) == (
        {1: 37.5, 2: 25.0},
        {1: 25.0, 2: 25.0},
        {1: 50.0, 2: 25.0},
    )
    assert z_loss.means == z_loss.lows == z_loss.highs == {2: 20.0}


def test_the_picture_draws_the_means_and_the_ranges(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda *figure: None)
    figures.comparison(LINES, rows, "title", tmp_path / "x.png")
    axes = plt.gcf().axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn == {"softmax:b=2": [[1, 37.5], [2, 25]], "z_loss:b=2": [[2, 20]]}
    band = axes.collections[0].get_paths()[0].vertices.tolist()
    assert [1.0, 25.0] in band and [1.0, 50.0] in band
    monkeypatch.undo()
    plt.close("all")
