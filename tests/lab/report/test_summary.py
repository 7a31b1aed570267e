"""Rows, tables and sentences of a comparison against values worked out by hand."""

from __future__ import annotations

import csv
import io
import math

import pytest
from scipy import stats

from softsphere_lab.report import canvas, figures, summary
from softsphere_lab.report.results import Results


def final(loss: str, seed: int, error: float, nll: float | None = None) -> dict:
    return {
        "loss": loss,
        "setting": loss,
        "lr": 0.001,
        "seed": seed,
        "final": {"test_error": error, "test_nll": nll, "seconds": 1.0, "diverged": False},
    }


def rows_of(lines: list[dict], trials: list[dict] = ()) -> list[summary.Row]:
    return summary.summarise(Results.of_lines({}, lines, trials))


def markdown_of(rows: list[summary.Row]) -> str:
    return summary.markdown_table(rows, summary.columns_with_differences(rows))


def test_a_row_pairs_by_seed_not_by_order():
    lines = [
        *(final("softmax", seed, error) for seed, error in enumerate((0.10, 0.20, 0.30))),
        *(final("z_loss", seed, error) for seed, error in ((2, 0.29), (0, 0.09), (1, 0.185))),
    ]
    rows = {row.loss: row for row in rows_of(lines)}
    assert rows["z_loss"].difference == pytest.approx(-3.5 / 3)
    expected = stats.ttest_rel([9, 18.5, 29], [10, 20, 30]).pvalue
    assert rows["z_loss"].p == pytest.approx(expected)
    assert rows["softmax"].p is None and rows["softmax"].difference is None
    assert rows["softmax"].error == pytest.approx(20.0)
    assert rows["z_loss"].nll is None


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (
            {"softmax": (0.10, 0.11, 0.12), "z_loss": (0.02, 0.031, 0.04)},
            "Better in test error than softmax",
        ),
        (
            {"softmax": (0.02, 0.031, 0.04), "z_loss": (0.10, 0.11, 0.12)},
            "Worse in test error than softmax",
        ),
        (
            {"softmax": (0.02, 0.04, 0.03), "z_loss": (0.03, 0.02, 0.031)},
            "Not shown to differ in test error from softmax",
        ),
        ({"softmax": (0.02,), "z_loss": (0.03,)}, "No loss was tested"),
        ({"softmax": (0.02, 0.03), "z_loss": (0.03, 0.04)}, "at least 3 seeds"),
        ({"z_loss": (0.03, 0.02)}, "softmax was not run"),
        ({"softmax": (0.03, 0.02)}, "softmax alone"),
    ],
)
def test_the_sentence_says_what_was_found(errors, words):
    lines = [final(loss, i, e) for loss, all_ in errors.items() for i, e in enumerate(all_)]
    sentence = summary.finding(rows_of(lines))
    assert words in sentence and sentence.endswith(".")


def runs(loss: str, errors: dict[int, float]) -> list[dict]:
    return [final(loss, seed, error) for seed, error in errors.items()]


def test_losses_with_other_seeds_are_told_apart_from_those_with_the_same():
    lines = [
        *runs("softmax", {0: 0.10, 1: 0.11, 2: 0.12, 3: 0.13}),
        *runs("squared_error", {0: 0.20, 1: 0.212, 2: 0.22, 3: 0.23}),
        *runs("taylor_softmax", {1: 0.10, 2: 0.125, 3: 0.12}),
        *runs("z_loss", {0: 0.09, 7: 0.50}),
        *runs("bohning_bound", {8: 0.50}),
    ]
    rows = {row.loss: row for row in rows_of(lines)}
    assert {name: row.pairs for name, row in rows.items()} == {
        "softmax": 4,
        "squared_error": 4,
        "taylor_softmax": 3,
        "z_loss": 1,
        "bohning_bound": 0,
    }
    # over the seed that both have, not the difference of the two means
    assert rows["z_loss"].difference == pytest.approx(-1.0)
    table = markdown_of(list(rows.values())).splitlines()
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[7] for line in table[2:]}
    assert cells == {
        "softmax": "–",
        "squared_error": "+10.05",
        "taylor_softmax": "-0.50 (3 pairs)",
        "z_loss": "-1.00 (1 pair)",
        "bohning_bound": "–",
    }
    sentence = summary.finding(list(rows.values()))
    assert (
        "Worse in test error than softmax (11.50 %): squared_error (21.55 %, p < 0.001)."
        in sentence
    )
    assert "Not shown to differ in test error from softmax (11.50 %): taylor_softmax." in sentence
    assert "Not tested, with too few common seeds: z_loss, bohning_bound." in sentence
    assert "The tests are of 3 to 4 common seeds." in sentence
    assert sentence.endswith("not from the choice of test images.")


def test_a_run_that_diverged_is_counted_and_is_in_no_mean_and_no_test():
    lines = [
        *runs("softmax", {s: 0.10 + 0.001 * s for s in range(4)}),
        *runs("z_loss", {s: 0.12 + 0.002 * s for s in range(4)}),
        *runs("squared_error", {0: 0.9, 1: 0.9}),
    ]
    for line in lines:
        line["final"]["diverged"] = line["loss"] == "squared_error"
    lines[7]["final"] = {**lines[7]["final"], "test_error": 0.9, "diverged": True}
    rows = {row.loss: row for row in rows_of(lines)}
    assert rows["z_loss"].error == pytest.approx(12.2)
    assert rows["z_loss"].difference == pytest.approx(2.1)
    assert (rows["z_loss"].seeds, rows["z_loss"].pairs, rows["z_loss"].diverged) == (4, 3, 1)
    assert math.isnan(rows["squared_error"].error) and rows["squared_error"].p is None
    assert "| squared_error (2 diverged) | 0.001 | 0 | 2 | – |" in markdown_of([*rows.values()])
    assert "Not tested, with too few common seeds: squared_error." in summary.finding(
        [*rows.values()]
    )
    assert "All runs of every loss diverged" in summary.finding([rows["squared_error"]])


def test_no_p_is_printed_as_zero():
    lines = runs("softmax", {s: 0.1 + s / 1e5 for s in range(5)})
    lines += runs("z_loss", {s: 0.2 + s / 9e4 for s in range(5)})
    rows = rows_of(lines)
    assert rows[1].p is not None and rows[1].p < 1e-6
    assert markdown_of(rows).splitlines()[-1].endswith("| < 0.001 |")
    assert "p < 0.001" in summary.finding(rows) and "0.000" not in summary.finding(rows)


def test_trials_are_counted_for_each_loss():
    lines = [*runs("softmax", {0: 0.1}), *runs("z_loss", {0: 0.1})]
    rows = rows_of(lines, [{"loss": "z_loss"}] * 3)
    assert [row.trials for row in rows] == [0, 3]


def test_a_comparison_without_a_search_says_so():
    lines = [final(loss, s, e + s / 97) for loss, e in (("softmax", 0.1), ("z_loss", 0.2))
             for s in range(3)]  # fmt: skip
    said = "All losses had the same learning rate, 0.001. It was not searched for"
    assert said in summary.finding(rows_of(lines))
    assert "search" not in summary.finding(rows_of(lines, [{"loss": "z_loss"}]))


def test_tables_hold_every_row_and_every_number():
    lines = [final("softmax", s, 0.1 + s / 100, 0.5) for s in range(3)]
    lines += [final("z_loss", s, 0.1) for s in range(3)]
    rows = rows_of(lines)
    markdown = markdown_of(rows).splitlines()
    assert len(markdown) == 4
    assert len({line.count("|") for line in markdown}) == 1
    table = list(csv.DictReader(io.StringIO(summary.csv_text(rows))))
    assert float(table[0]["error"]) == pytest.approx(11.0)
    assert table[1]["nll"] == ""


@pytest.mark.parametrize("count", [1, 10, 11, 20, 21, 60])
def test_every_loss_has_a_colour_of_its_own(count):
    assert len({tuple(colour) for colour in canvas.distinguishable(count)}) == count


def test_a_picture_of_many_losses_can_be_drawn(tmp_path):
    lines = [final(f"z_loss:b={b}", 0, 0.1) for b in range(21)]
    lines += [{"loss": "z_loss:b=0", "seed": 0, "epoch": 1, "valid_error": 0.1}]
    figures.comparison(lines, rows_of(lines), "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize("valid_error", [None, 0.0, 0.1])
def test_the_picture_can_always_be_drawn(tmp_path, valid_error):
    lines = [final("softmax", 0, 0.1), final("z_loss", 0, 0.0)]
    rows = rows_of(lines)
    if valid_error is not None:
        lines += [{"loss": "softmax", "seed": 0, "epoch": 1, "valid_error": valid_error}]
    figures.comparison(lines, rows, "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
