"""Ratios and tests of paired seeds, and how numbers stand in a table."""

from __future__ import annotations

import math

import pytest

from _lab_results import results_of, text_end
from softsphere_lab.experiments.on_text.text_sections import (
    MRR,
    PERPLEXITY,
    outputs_named,
    ratios_to_softmax,
    softmax_references,
)
from softsphere_lab.report import measures


def test_ratios_and_tests_are_paired_by_seed_and_network():
    # the seeds differ by much more than the losses, which only pairs can see
    base = [4.0, 5.0, 6.0, 7.0]
    ends = [text_end("softmax lstm", seed, nll) for seed, nll in enumerate(base)]
    ends += [text_end("taylor_softmax lstm", seed, nll + 0.1 + 0.001 * seed)
             for seed, nll in enumerate(base)]  # fmt: skip
    ends += [text_end("softmax", seed, 1.0 + seed) for seed in range(4)]
    found = results_of(ends)
    reference = softmax_references(outputs_named(found.ends))
    assert reference["taylor_softmax lstm"] == "softmax lstm"
    middle, low, high = measures.ratio(
        found.ends, "taylor_softmax lstm", "softmax lstm", PERPLEXITY
    )
    assert middle == pytest.approx(math.exp(0.1015)) and low < middle < high < math.exp(0.105)
    p = measures.p_values(found.ends, PERPLEXITY, reference)
    # of perplexities, which differ in proportion, the test would see but the seeds
    assert p["taylor_softmax lstm"] < 1e-4
    assert measures.p_values(found.ends, MRR, reference)["taylor_softmax lstm"] == 1.0
    assert "softmax lstm" not in p
    assert "log-Taylor softmax, LSTM 1.107 (1.105 to 1.109)" in ratios_to_softmax(found, reference)


def test_a_missing_seed_pairs_nothing_and_one_seed_has_no_interval():
    found = results_of([text_end("softmax", 0, 4.0), text_end("taylor_softmax", 1, 5.0)])
    assert measures.ratio(found.ends, "taylor_softmax", "softmax", PERPLEXITY) is None
    assert measures.p_values(found.ends, PERPLEXITY, {"taylor_softmax": "softmax"}) == {}
    one = results_of([text_end("softmax", 0, 4.0), text_end("taylor_softmax", 0, 5.0)])
    middle, low, high = measures.ratio(one.ends, "taylor_softmax", "softmax", PERPLEXITY)
    assert middle == pytest.approx(math.e) and math.isnan(low) and math.isnan(high)
    assert measures.estimate_cell(one.ends["softmax"], PERPLEXITY) == "54.6"
