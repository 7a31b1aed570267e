"""Tables, tests and sentences against values worked out by hand or by another library."""

from __future__ import annotations

import csv
import io
import math

import pytest
from scipy import stats

from softsphere.lab import figures, inference, summary


def final(loss: str, seed: int, error: float, nll: float | None = None) -> dict:
    return {
        "loss": loss,
        "setting": loss,
        "lr": 0.001,
        "seed": seed,
        "final": {"test_error": error, "test_nll": nll, "seconds": 1.0, "diverged": False},
    }


def test_the_interval_is_students():
    mean, half = inference.interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=math.sqrt(7 / 9))
    assert mean == pytest.approx(7 / 3)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(inference.interval([1.0])[1])


def test_the_paired_test_by_hand_and_at_its_limits():
    # differences 1, 2, 3: t = 2 / (1 / √3)
    t = 2 * math.sqrt(3)
    assert inference.paired_p([2, 4, 6], [1, 2, 3]) == pytest.approx(2 * stats.t.sf(t, 2))
    assert inference.paired_p([1, 2], [1, 2]) == 1.0
    assert math.isnan(inference.paired_p([1], [2]))


def test_holm_multiplies_the_smallest_most_and_never_falls():
    assert inference.holm([0.02, 0.03, math.nan, 0.5])[:2] == pytest.approx([0.06, 0.06])
    assert math.isnan(inference.holm([0.02, math.nan])[1])
    assert inference.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_row_pairs_by_seed_not_by_order():
    lines = [
        *(final("softmax", seed, error) for seed, error in enumerate((0.10, 0.20, 0.30))),
        *(final("z_loss", seed, error) for seed, error in ((2, 0.29), (0, 0.09), (1, 0.185))),
    ]
    rows = {row.loss: row for row in summary.summarise(lines)}
    assert rows["z_loss"].difference == pytest.approx(-3.5 / 3)
    expected = stats.ttest_rel([9, 18.5, 29], [10, 20, 30]).pvalue
    assert rows["z_loss"].p == pytest.approx(expected)
    assert rows["softmax"].p is None and rows["softmax"].difference is None
    assert rows["softmax"].error == pytest.approx(20.0)
    assert rows["z_loss"].nll is None


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({"softmax": (0.10, 0.11, 0.12), "z_loss": (0.02, 0.031, 0.04)}, "Better than softmax"),
        ({"softmax": (0.02, 0.031, 0.04), "z_loss": (0.10, 0.11, 0.12)}, "Worse than softmax"),
        ({"softmax": (0.02, 0.04, 0.03), "z_loss": (0.03, 0.02, 0.031)}, "No loss differs"),
        ({"softmax": (0.02,), "z_loss": (0.03,)}, "One seed tells nothing"),
        ({"z_loss": (0.03, 0.02)}, "softmax was not run"),
        ({"softmax": (0.03, 0.02)}, "softmax alone"),
    ],
)
def test_the_sentence_says_what_was_found(errors, words):
    lines = [final(loss, i, e) for loss, all_ in errors.items() for i, e in enumerate(all_)]
    sentence = summary.finding(summary.summarise(lines))
    assert words in sentence and sentence.endswith(".")


def test_tables_hold_every_row_and_every_number():
    lines = [final("softmax", s, 0.1 + s / 100, 0.5) for s in range(3)]
    lines += [final("z_loss", s, 0.1) for s in range(3)]
    rows = summary.summarise(lines)
    markdown = summary.to_markdown(rows).splitlines()
    assert len(markdown) == 4
    assert len({line.count("|") for line in markdown}) == 1
    table = list(csv.DictReader(io.StringIO(summary.to_csv(rows))))
    assert float(table[0]["error"]) == pytest.approx(11.0)
    assert table[1]["nll"] == ""


@pytest.mark.parametrize("valid_error", [None, 0.0, 0.1])
def test_the_picture_can_always_be_drawn(tmp_path, valid_error):
    lines = [final("softmax", 0, 0.1), final("z_loss", 0, 0.0)]
    rows = summary.summarise(lines)
    if valid_error is not None:
        lines += [{"loss": "softmax", "seed": 0, "epoch": 1, "valid_error": valid_error}]
    figures.comparison(lines, rows, "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
