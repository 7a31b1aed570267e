"""What a record has of a study and what is left: searches, second looks, final runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from softsphere_lab.errors import LabError
from softsphere_lab.experiments.on_images.classification import RATES, Classification
from softsphere_lab.experiments.on_text import ptb
from softsphere_lab.experiments.on_text.language_modelling import LanguageModelling
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Record
from softsphere_lab.study import ledger, protocol
from softsphere_lab.study.search import Axis
from softsphere_lab.study.spec import LossSpec
from softsphere_lab.training.image_run import Schedule

STUDY = Classification(
    dataset="digits",
    losses=(LossSpec.parse("softmax"), LossSpec.parse("spherical_softmax")),
    seeds=(0, 1),
    schedule=Schedule("mlp", 1, 128, "cpu"),
    rates=RATES,
    tune=True,
)


def end(loss: str, setting: str, lr: float, seed: int, error: float) -> dict:
    final = {"best_epoch": 1, "valid_error": error, "mean_valid_error": error,
             "test_error": None if seed == protocol.TUNING_SEED else error, "test_nll": None,
             "seconds": 1.0, "diverged": False}  # fmt: skip
    return {"loss": loss, "setting": setting, "lr": lr, "seed": seed, "final": final}


def fill(record: Record, of: Classification, error) -> int:
    """Does all that is planned, with errors that are given. Returns how many runs that took."""
    count = 0
    while tasks := ledger.planned(of, record).tasks:
        task = tasks[0]
        line = end(task.loss, task.setting, task.lr, task.seed, error(task))
        record.add(task.file, [line])
        count += 1
    return count


def away(task: protocol.Task) -> float:
    """Least at a rate of 0.03 and an ε of 10."""
    eps = dict(LossSpec.parse(task.setting).given).get("eps", 10.0)
    return abs(math.log(task.lr / 0.03)) + abs(math.log(eps / 10.0))


def test_every_loss_is_searched_alike_and_its_final_runs_have_what_was_found(tmp_path):
    record = Record.create(tmp_path / "r", STUDY.config())
    assert ledger.missing(STUDY, record) == {"softmax": 2, "spherical_softmax": 2}
    fill(record, STUDY, away)
    assert ledger.missing(STUDY, record) == {}
    finals = ledger.final_runs(Classification, record)
    assert [(line["setting"], line["lr"], line["seed"]) for line in finals] == [
        ("softmax", 0.03, 0),
        ("spherical_softmax:eps=10", 0.03, 0),
        ("softmax", 0.03, 1),
        ("spherical_softmax:eps=10", 0.03, 1),
    ]
    # both from the same rate, one step at a time
    trials = ledger.trial_runs(Classification, record)
    rates = [line["lr"] for line in trials if line["loss"] == "softmax"]
    assert rates == [0.001, 0.0003, 0.003, 0.01, 0.03, 0.1]


def test_a_final_run_with_another_choice_does_not_count(tmp_path):
    record = Record.create(tmp_path / "r", STUDY.config())
    record.add(protocol.RUNS, [end("softmax", "softmax", 0.1, 0, 0.5)])
    fill(record, STUDY, away)
    plan = ledger.planned(STUDY, record)
    trials = ledger.trial_runs(Classification, record)
    assert plan.tasks == [] and (plan.trials, plan.finals) == (len(trials), 4)


def test_more_seeds_are_added_and_no_trial_is_done_again(tmp_path):
    record = Record.create(tmp_path / "r", STUDY.config())
    fill(record, STUDY, away)
    assert fill(record, replace(STUDY, seeds=(0, 1, 2)), away) == 2


def test_a_longer_axis_goes_on_with_the_search_and_the_new_choice_takes_the_place_of_the_old(
    tmp_path,
):
    short = replace(STUDY, rates=Axis((1e-3, 3e-3, 1e-2), 1e-3))
    record = Record.create(tmp_path / "r", short.config())
    fill(record, short, away)
    before = ledger.trial_runs(Classification, record)
    assert {line["lr"] for line in ledger.final_runs(Classification, record)} == {1e-2}

    long = replace(STUDY, rates=Axis((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-3))
    record = Record.reopen(tmp_path / "r", long.config(), long.grows)
    fill(record, long, away)
    trials = ledger.trial_runs(Classification, record)
    assert trials[: len(before)] == before
    assert {line["lr"] for line in trials[len(before) :]} == {3e-2, 1e-1}
    finals = ledger.final_runs(Classification, record)
    assert len(finals) == 4 and {line["lr"] for line in finals} == {3e-2}


def test_a_record_of_another_search_is_refused(tmp_path):
    Record.create(tmp_path / "r", STUDY.config())
    other = replace(STUDY, rates=Axis((1e-3, 2e-3), 1e-3))
    with pytest.raises(
        LabError, match=r"search\.lr\.values = \[.*0\.001, .*, not \[0\.001, 0\.002\]"
    ):
        Record.reopen(tmp_path / "r", other.config(), other.grows)


def test_what_a_search_may_try_is_part_of_what_was_asked():
    asked = STUDY.config()["search"]
    assert asked["lr"] == {"values": list(RATES.values), "start": RATES.start}
    assert "spherical_softmax:eps" in asked
    assert set(replace(STUDY, tune=False).config()["search"]) == {"lr"}


def test_a_second_look_moves_the_rate_by_trials_as_long_as_final_runs(tmp_path):
    look = replace(STUDY, second_look=True)
    record = Record.create(tmp_path / "r", look.config())

    def error(task: protocol.Task) -> float:
        # what is best in short trials is too large a rate for long ones
        best = 0.003 if task.whole or not task.trial else 0.03
        return abs(math.log(task.lr / best))

    fill(record, look, error)
    assert ledger.missing(look, record) == {}
    finals = ledger.final_runs(Classification, record)
    assert {(line["loss"], line["lr"]) for line in finals} == {
        ("softmax", 0.003),
        ("spherical_softmax", 0.003),
    }
    looks = [line for line in record.lines(protocol.LOOKS) if line["loss"] == "softmax"]
    # 0.1 lies behind 0.03, and 0.01 is better
    assert [line["lr"] for line in looks] == [0.03, 0.01, 0.003, 0.001]
    # ε stays what the search chose
    assert len({line["setting"] for line in record.lines(protocol.LOOKS)}) == 2
    assert all(line["seed"] == protocol.TUNING_SEED for line in looks)
    # a record without one can be gone on with to have one, and not the other way
    plain = Record.create(tmp_path / "plain", STUDY.config())
    assert plain.matches(look.config(), look.grows)
    assert not record.matches(STUDY.config(), look.grows)


def test_a_second_look_trains_as_long_as_a_final_run():
    asked = replace(ptb.EXPERIMENT.studies["smoke"], second_look=True, trial_epochs=1)
    data = asked.load()

    def epochs(**more: bool) -> int:
        task = protocol.Task("softmax", "softmax", 3e-3, 0, **more)
        history, final = asked.train(task, data, Checkpoint(), lambda *_: None)
        assert (final["test_mrr"] is None) == task.trial
        return len(history)

    assert epochs(trial=True) == 1
    assert epochs(trial=True, whole=True) == epochs(trial=False) == asked.setup.epochs > 1


def test_a_second_look_goes_along_every_learning_rate(tmp_path):
    name = "taylor_softmax factored"
    small = ptb.EXPERIMENT.studies["small"]
    look = replace(small, outputs=(Output.parse(name),), seeds=(0,), second_look=True)
    record = Record.create(tmp_path / "r", look.config())
    looked = set()
    while tasks := ledger.planned(look, record).tasks:
        for task in tasks:
            best = 0.1 if task.whole or not task.trial else 0.01
            layer = float(task.setting.split("rate=")[1].split()[0])
            nll = abs(math.log(layer / best)) + abs(math.log(task.lr / 0.003))
            looked |= {(layer, task.lr)} if task.whole else set()
            record.add(task.file, [{**task.line(), "final": text_end(nll, read=not task.trial)}])
    assert {layer for layer, _ in looked} == {0.001, 0.01, 0.1, 1.0}
    assert {lr for _, lr in looked} == {0.001, 0.003, 0.01}
    (final,) = ledger.final_runs(LanguageModelling, record)
    assert "rate=0.1" in final["setting"] and final["lr"] == 0.003


def text_end(nll: float, *, read: bool) -> dict:
    nothing = dict.fromkeys(("test_nll", "test_top1", "test_top10", "test_mrr"))
    similarity = {"simlex999": None, "wordsim353": None}
    pairs = {"simlex999_pairs": 0, "wordsim353_pairs": 0}
    ended = {"engine": "none", "best_epoch": 1, "seconds": 1.0, "diverged": False}
    read_once = {"test_mrr": 0.1} if read else {}
    return {
        "valid_nll": nll,
        "valid_mrr": 0.1,
        **nothing,
        **read_once,
        **similarity,
        **pairs,
        **ended,
    }


def test_a_search_that_comes_back_to_an_earlier_choice_counts_no_run_twice(tmp_path):
    record = Record.create(tmp_path / "r", STUDY.config())
    rates = (0.01, 0.03, 0.01)
    for lr in rates:
        record.add(protocol.RUNS, [end("softmax", "softmax", lr, seed, lr) for seed in (0, 1)])
    finals = ledger.final_runs(Classification, record)
    assert [(line["lr"], line["seed"]) for line in finals] == [(0.01, 0), (0.01, 1)]


def test_what_a_study_asks_for_is_known_from_the_start_but_for_the_length_of_its_search(tmp_path):
    """The total of the final runs never changes, and the search has one once it is finished."""
    record = Record.create(tmp_path / "r", STUDY.config())
    plans = [ledger.planned(STUDY, record)]
    while plans[-1].tasks:
        task = plans[-1].tasks[0]
        record.add(task.file, [end(task.loss, task.setting, task.lr, task.seed, away(task))])
        plans.append(ledger.planned(STUDY, record))
    assert {plan.finals_in_all for plan in plans} == {4}
    assert len({plan.trials for plan in plans if not plan.searching}) == 1
    assert [plan.searching for plan in plans] == sorted(
        (plan.searching for plan in plans), reverse=True
    )
    assert plans[-1].finals == 4


def test_an_output_that_is_asked_for_once_has_the_first_seed_alone(tmp_path):
    once = Output("taylor_softmax")
    asked = replace(
        ptb.FULL, outputs=(Output("softmax"), once), once=(once,), rates=Axis.fixed(1e-3)
    )
    assert asked.finals == len(asked.seeds) + 1
    record = Record.create(tmp_path / "r", asked.config())
    assert ledger.missing(asked, record) == {"softmax": 3, "taylor_softmax": 1}
    plan = ledger.planned(asked, record)
    assert [(task.loss, task.seed) for task in plan.tasks] == [
        ("softmax", 0), ("taylor_softmax", 0), ("softmax", 1), ("softmax", 2)
    ]  # fmt: skip
    assert (plan.finals, plan.finals_in_all) == (0, 4)
