"""What is said of networks of several depths and activations."""

from __future__ import annotations

from _lab_results import results_of, text_end
from softsphere_lab.experiments.on_text.ablation import ablation_section


def test_the_ablation_compares_on_the_same_network():
    ends = [
        text_end(
            f"{loss} depth={depth} activation=relu", seed, 4.0 + (loss != "softmax") * 0.1 * depth
        )
        for loss in ("softmax", "taylor_softmax")
        for depth in (1, 2)
        for seed in range(3)
    ]
    found = ablation_section(results_of(ends))
    assert "1.105 (log-Taylor softmax, relu, depth 1) to 1.221" in found.finding
    assert "none was shown to be below" in found.finding and "Without a run" not in found.finding


def test_the_ablation_names_what_it_cannot_compare_and_draws_a_gap(tmp_path, recwarn):
    ends = [
        text_end(f"{loss} depth={depth} activation=exp", seed, 4.0 + 0.01 * seed,
            diverged=depth == 3 and loss != "softmax")
        for loss in ("softmax", "taylor_softmax")
        for depth in (2, 3)
        for seed in range(3)
    ]  # fmt: skip
    found = ablation_section(results_of(ends))
    assert found.finding.endswith("none is done: log-Taylor softmax, exp, depth 3.")
    found.pictures["networks"](tmp_path / "networks.png")
    assert not [str(warning.message) for warning in recwarn if "empty" in str(warning.message)]


def test_a_run_that_diverged_is_counted_and_is_in_no_mean_test_or_sentence():
    ends = [
        text_end("softmax depth=1 activation=exp", seed, 4.0 + 0.01 * seed) for seed in range(3)
    ]
    ends += [
        text_end("taylor_softmax depth=1 activation=exp", seed, 9.0, diverged=True)
        for seed in range(3)
    ]
    found = ablation_section(results_of(ends))
    row = next(line for line in found.table.splitlines() if "Taylor" in line)
    assert "| 0 | 3 (3 diverged) | – | – | – |" in row
    assert found.finding == "Nothing can be compared with softmax yet."
