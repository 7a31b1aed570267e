"""The sections of the experiments on text."""

from __future__ import annotations

import math

import pytest

from _lab_results import STUDIES, results_of, text_end
from softsphere_lab.experiments.on_text.text_sections import goals, seconds_to_goal, text_section


def test_seconds_to_a_perplexity_are_between_epochs():
    def epoch(number, nll, seconds=10.0, seed=0):
        return {"loss": "softmax", "seed": seed, "epoch": number, "valid_nll": nll,
                "seconds": seconds}  # fmt: skip

    epochs = [epoch(1, 6.0), epoch(2, 5.0), epoch(3, 4.0)]
    found = results_of([text_end("softmax", 0, 4.0)], epochs)
    assert seconds_to_goal(found, "softmax", math.exp(4.5)) == "25"
    assert seconds_to_goal(found, "softmax", math.exp(6.5)) == "≤ 10"
    assert seconds_to_goal(found, "softmax", math.exp(3.9)) == "–"
    # one seed that does not come there is enough
    both = results_of(
        [text_end("softmax", 0, 4.0), text_end("softmax", 1, 4.0)], [*epochs, epoch(1, 4.9, seed=1)]
    )
    assert seconds_to_goal(both, "softmax", math.exp(4.5)) == "–"


def test_a_loss_without_probabilities_has_ranks_alone():
    found = results_of(
        [text_end("softmax", 0, 4.0), text_end("z_loss", 0, 1.0, valid_nll=None, test_nll=None)]
    )
    row = next(x for x in text_section(found).table.splitlines() if x.startswith("| Z-loss"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[6:8] == ["–", "–"] and cells[10] == "0.1500"
    assert "Z-loss" not in text_section(found).finding


def test_the_paper_stands_beside_its_own_data_alone():
    found = results_of([text_end("softmax", 0, 4.0)])
    assert "126.7" in text_section(found).table
    assert (
        "126.7"
        not in text_section(results_of([text_end("softmax", 0, 4.0)], dataset="wikipedia")).table
    )


@pytest.mark.parametrize("nll", [800.0, math.inf])
def test_a_likelihood_beyond_numbers_is_told_as_infinite(nll, tmp_path):
    epoch = {"loss": "softmax", "seed": 0, "epoch": 1, "valid_nll": nll, "seconds": 1.0}
    for experiment in ("ptb", "ablation", "classes"):
        words = {"ptb": "", "ablation": " depth=1 activation=relu", "classes": " classes=10"}
        ends = [text_end(f"{loss}{words[experiment]}", 0, nll if loss == "softmax" else 4.0)
                for loss in ("softmax", "taylor_softmax")]  # fmt: skip
        each = {**epoch, "loss": f"softmax{words[experiment]}"}
        section = STUDIES[experiment].section_of(results_of(ends, [each]))
        assert "| inf |" in section.table
        for name, draw in section.pictures.items():
            draw(tmp_path / f"{name}.png")
    study = STUDIES["ptb"].studies["full"]
    assert "perplexity inf" in study.outcome({"valid_nll": nll, "valid_mrr": 0.1, "seconds": 1.0,
                                           "diverged": False})  # fmt: skip


def test_one_perplexity_to_come_to_is_for_all_and_one_for_half():
    ends = {"softmax": 143.0, "taylor_softmax": 201.0, "spherical_softmax": 235.0}
    lines = [text_end(name, 0, math.log(value)) for name, value in ends.items()]
    assert goals(results_of(lines)) == [240, 210]
    # without probabilities, and beyond numbers, there is nothing to come to
    others = [text_end("z_loss", 0, 1.0, valid_nll=None), text_end("squared_error", 0, math.inf)]
    assert goals(results_of([*lines, *others])) == [240, 210]
    assert goals(results_of(lines[:1])) == [150]


def test_ranks_alone_have_no_perplexity_to_come_to():
    found = text_section(results_of([text_end("z_loss", 0, 1.0, valid_nll=None, test_nll=None)]))
    assert "nan" not in found.text
    assert "seconds an epoch" in found.text and "seconds to" not in found.text
