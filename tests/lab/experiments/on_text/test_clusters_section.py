"""What is said of layers with clusters."""

from __future__ import annotations

from _lab_results import results_of, text_end
from softsphere_lab.experiments.on_text.clusters_section import clusters_section


def ends(*gaps: tuple[str, float], seeds: int = 3) -> list[dict]:
    """Runs whose likelihoods are so far above 3."""
    return [
        text_end(name, seed, 3.0 + gap + 0.01 * seed + 0.001 * (seed == place % 3))
        for place, (name, gap) in enumerate(gaps)
        for seed in range(seeds)
    ]


def test_the_softmax_that_is_better_on_validation_data_is_the_reference():
    found = clusters_section(
        results_of(ends(("softmax", 0.0), ("softmax prior", -0.1), ("taylor_softmax prior", 0.1)))
    )
    assert "The reference is softmax, base measure, which is better on validation" in found.finding
    for words in ("1.105 (1.102 to 1.108) with softmax;",
                  "1.221 (1.218 to 1.224) with log-Taylor softmax, base measure."):  # fmt: skip
        assert words in found.finding
    row = next(x for x in found.table.splitlines() if x.startswith("| softmax, base measure"))
    assert [cell.strip() for cell in row.split("|")][7] == "–"
    # one with fewer seeds is not taken for it
    fewer = ends(("softmax", 0.0), ("taylor_softmax prior", 0.1)) + ends(
        ("softmax prior", -0.1), seeds=1
    )
    assert "The reference is softmax, which" in clusters_section(results_of(fewer)).finding
    # nothing is said where there is one softmax
    assert "The reference" not in clusters_section(results_of(ends(("softmax", 0.0)))).finding


def test_the_best_clusters_by_meaning_are_compared_with_the_best_of_each_kind():
    found = clusters_section(
        results_of(
            ends(
                ("softmax", 0.0),
                ("adaptive_softmax", 0.2),
                ("adaptive_softmax cutoffs=20", 0.1),
                ("taylor_softmax clusters=1 shortlist=5", 0.3),
                ("taylor_softmax clusters=4 shortlist=5", 0.02),
                ("taylor_softmax clusters=8 shortlist=5", 0.01),
                ("taylor_softmax clusters=8 shortlist=5 by=frequency", 0.05),
                ("softmax clusters=8 shortlist=5", 0.0),
            )
        )
    ).finding
    told = found[found.index("Of the layers") :]
    assert told.startswith(
        "Of the layers with log-Taylor softmax within clusters by meaning, "
        "log-Taylor softmax, 8 clusters"
    )
    for words in ("0.914 times that of adaptive softmax, cutoffs 20 (p ",
                  "0.748 times that of log-Taylor softmax, one cluster, shortlist 5 (p ",
                  "0.961 times that of log-Taylor softmax, 8 clusters, shortlist 5, by frequency",
                  "1.010 times that of softmax, 8 clusters, shortlist 5"):  # fmt: skip
        assert words in told


def test_the_sweep_is_drawn_where_there_is_one(tmp_path):
    few = ends(("softmax", 0.0), ("taylor_softmax clusters=4 shortlist=5", 0.02), seeds=1)
    assert "sweep" not in clusters_section(results_of(few)).pictures
    more = few + ends(
        *((f"taylor_softmax clusters={C} shortlist=5", 0.2 / C) for C in (1, 8)),
        ("taylor_softmax clusters=8 shortlist=5 by=frequency", 0.1),
        seeds=1,
    )
    clusters_section(results_of(more)).pictures["sweep"](tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").exists()
