"""Engines that train one model alike: the same curves, whole records, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from softsphere_lab.experiments.experiment import prepare_study
from softsphere_lab.experiments.on_engines import engines, twins
from softsphere_lab.experiments.on_engines.side_by_side import side_by_side_section
from softsphere_lab.progress import standard_console
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Record
from softsphere_lab.report.results import Results
from softsphere_lab.study.protocol import Task

STUDIES = {
    "twins": twins.FLOAT32.studies["smoke"],
    "engines": engines.EXPERIMENT.studies["smoke"],
}
TOLERANCE = {"float32": 1e-3, "float64": 1e-11}


def trained(study, engine: str, kept: Checkpoint | None = None, on_epoch=lambda *_: None):
    task = Task(engine, engine, study.lr, study.seed, trial=False)
    return study.train(task, study.load(), kept or Checkpoint(), on_epoch)


@pytest.mark.parametrize(
    ("name", "changes", "dtype"),
    [
        ("twins", {}, "float64"),
        ("twins", {"momentum": 0.9, "lr": 0.005}, "float32"),
        ("twins", {"prior": False, "loss": "z_loss"}, "float64"),
        ("engines", {}, "float32"),
        ("engines", {"prior": False, "loss": "squared_error"}, "float64"),
    ],
)
def test_all_engines_have_the_same_curve(name, changes, dtype):
    study = replace(STUDIES[name], dtype=dtype, **changes)
    runs = {engine: trained(study, engine) for engine in study.names}
    curves = {
        engine: [epoch["valid_loss"] for epoch in history] for engine, (history, _) in runs.items()
    }
    *others, reference = curves.values()
    assert len(reference) == 2 and reference[1] < reference[0]
    for curve in others:
        assert curve == pytest.approx(reference, rel=TOLERANCE[dtype])
    assert not any(final["diverged"] for _, final in runs.values())
    assert (name == "twins") == any(final["health"] is not None for _, final in runs.values())


@pytest.mark.parametrize("name", STUDIES)
def test_a_run_that_is_stopped_ends_as_one_that_was_not(name, tmp_path):
    study = STUDIES[name]
    engine = study.names[0]

    def stop(epoch, epochs):
        raise KeyboardInterrupt

    def untimed(run):
        history, final = run
        losses = [{k: v for k, v in epoch.items() if k != "step_seconds"} for epoch in history]
        return losses, final["test_loss"]

    kept = Checkpoint(tmp_path / "kept" / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(study, engine, kept, stop)
    assert untimed(trained(study, engine, kept)) == untimed(trained(study, engine))


@pytest.mark.parametrize("name", STUDIES)
def test_going_on_trains_the_engine_that_is_missing_and_the_section_compares_all(
    name, tmp_path, monkeypatch
):
    study = STUDIES[name]
    prepared = prepare_study(study, study.load(), experiment=name, budget="smoke")
    record, begun, real = Record.create(tmp_path / "r", prepared.config), [], type(study).begin

    def begin(self, engine, data):
        begun.append(engine)
        if engine == "dense" and begun.count("dense") == 1:
            raise KeyboardInterrupt
        return real(self, engine, data)

    monkeypatch.setattr(type(study), "begin", begin)
    with pytest.raises(KeyboardInterrupt):
        prepared.run(record, standard_console(), 1)
    prepared.run(record, standard_console(), 1)
    assert begun == [*study.names, "dense"]
    section = side_by_side_section(Results.of_record(type(study), record))
    assert section.finding.count("differ by at most") == len(study.names) - 1
    rows = [line.split(" | ")[0][2:] for line in section.table.splitlines()[2:]]
    assert rows == list(study.names)


def test_an_engine_that_diverges_says_so():
    study = replace(STUDIES["engines"], lr=1e30)
    history, final = trained(study, "dense")
    assert final["diverged"] and len(history) < study.epochs
    line = {"loss": "dense", "setting": "dense", "lr": 1e30, "seed": 0, "final": final}
    section = side_by_side_section(Results.of_lines(study.config(), [line]))
    assert "| dense (diverged) |" in section.table
    assert section.finding == "No two engines can be compared yet."
