"""Ratios of a table of heads count the softmaxes that are exact, and those alone."""

from __future__ import annotations

from softsphere_lab.timing import softmax_peers
from softsphere_lab.timing.benchmark import Row, left_out
from softsphere_lab.timing.head_measures import CAPTURED, MILLISECONDS
from softsphere_lab.timing.head_ratios import FASTEST, fastest_exact_softmax, label
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.softmax_peers import GPU_SOFTMAX

SETTING = Setting(D=10, d=4, m=2)


def ratios(times, head="Gemma"):
    """The ratios of a table with these milliseconds: as Python runs a layer, and captured."""
    rows = [
        Row(label(head, name), SETTING, measure, value).cells()
        for name, both in times.items()
        for measure, value in zip((MILLISECONDS, CAPTURED), both, strict=True)
        if value is not None
    ]
    rows += [
        left_out(label(head, name), SETTING, "no room").cells()
        for name in GPU_SOFTMAX
        if name not in times
    ]
    found = {}
    for row in fastest_exact_softmax(rows):
        assert row.setting == SETTING
        found[row.layer, row.measure] = row.value
    return found


def test_our_layers_are_compared_with_the_fastest_exact_softmax():
    found = ratios(
        {
            "gram": (4.0, 1.0),
            "chunked": (8.0, None),
            "softmax, compiled": (20.0, 18.0),
            "softmax, chunks of 8192 rows": (22.0, 16.0),
            "Liger, float32 sums": (12.0, None),
            "Liger": (3.0, 3.0),
            "cut cross-entropy": (2.0, 2.0),
        }
    )
    best = f"Gemma: {FASTEST}"
    chunks = "softmax, chunks of 8192 rows"
    assert found == {
        (best, "is"): "Liger, float32 sums",
        (best, "times gram (ours)"): 3.0,
        (best, "times chunked (ours)"): 1.5,
        (best, "is, captured"): chunks,
        (best, "times gram (ours), captured"): 16.0,
        # each at its best: a graph here, and what Python runs there
        (best, "is, at best"): "Liger, float32 sums",
        (best, "times gram (ours), at best"): 12.0,
        (best, "times chunked (ours), at best"): 1.5,
    }


def test_in_float32_sums_in_the_dtype_of_the_weight_are_exact():
    found = ratios(
        {"gram": (4.0, None), "Liger": (6.0, None), "softmax": (8.0, None)},
        head="Gemma, float32 high",
    )
    assert found[f"Gemma, float32 high: {FASTEST}", "times gram (ours)"] == 1.5


def test_a_peer_is_found_by_its_version(monkeypatch):
    monkeypatch.setattr(softmax_peers, "version", lambda package: "1.2")
    assert label("Gemma", "Liger, float32 sums") == "Gemma: Liger, float32 sums 1.2"
    found = ratios({"gram": (4.0, None), "Liger, float32 sums": (6.0, None)})
    assert found[f"Gemma: {FASTEST}", "times gram (ours)"] == 1.5


def test_the_version_of_a_package_that_was_replaced_since_does_not_matter(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(softmax_peers, "version", lambda package: "1.2")
        rows = [
            Row(label("Gemma", name), SETTING, MILLISECONDS, 6.0).cells() for name in GPU_SOFTMAX
        ]
    rows.append(Row("Gemma: gram", SETTING, MILLISECONDS, 4.0).cells())
    ratios = [row.value for row in fastest_exact_softmax(rows) if row.measure.startswith("times")]
    assert ratios == [1.5, 1.5]  # as Python runs them, and at best


def test_a_table_that_lacks_an_exact_softmax_has_no_ratios_yet():
    names = ("gram", *GPU_SOFTMAX)
    rows = [Row(label("Gemma", name), SETTING, MILLISECONDS, 4.0).cells() for name in names]
    assert list(fastest_exact_softmax(rows))
    for name in ("softmax", "Liger, float32 sums", "softmax, chunks of 2048 rows"):
        some = [row for row in rows if row["layer"] != label("Gemma", name)]
        assert not list(fastest_exact_softmax(some))
    # one that is not exact does not matter
    some = [row for row in rows if row["layer"] != label("Gemma", "cut cross-entropy")]
    assert list(fastest_exact_softmax(some))


def test_without_an_exact_softmax_there_is_no_ratio():
    assert not ratios({"gram": (4.0, 2.0), "cut cross-entropy": (2.0, 2.0)})


def test_each_setting_of_a_head_has_ratios_of_its_own():
    rows = [
        Row(label("Gemma", name), Setting(D=10, d=4, m=m), MILLISECONDS, value).cells()
        for m in (2, 3)
        for name, value in (("gram", float(m)), *((name, 6.0) for name in GPU_SOFTMAX))
    ]
    ratios = fastest_exact_softmax(rows)
    found = [row.value for row in ratios if row.measure.startswith("times gram")]
    assert found == [3.0, 3.0, 2.0, 2.0]
