"""The scripts in `benchmarks/`: each runs, and behaves on the command line as users expect."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing import benchmark, softmax_peers
from softsphere_lab.timing.benchmark import (
    COLUMNS,
    UNFINISHED,
    Case,
    Row,
    left_out,
    read_table,
    run,
)
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.head_measures import measures_of
from softsphere_lab.timing.processes import Measured
from softsphere_lab.timing.setting import Setting

FOLDER = Path(__file__).parents[3] / "benchmarks"
QUESTIONS = sorted(
    path.stem for path in FOLDER.glob("*.py") if "run(__file__" in "".join(path.read_text().split())
)
SETTING = Setting(D=10, d=4, m=2)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A benchmark of two cases; the second is stopped as long as `stops` holds something."""
    path = tmp_path / "question.py"
    measured, stops = [], []

    def measure(name):
        measured.append(name)
        yield Row(name, SETTING, "seconds", 0.125)
        if name == "second" and stops:
            raise KeyboardInterrupt
        now[0] += 60.0
        yield Row(name, SETTING, "is", "fast")

    def started(*arguments):
        def cases(options):
            options.only = options.only or ["first", "second"]
            return [Case(name, lambda name=name: measure(name)) for name in options.only]

        def add_options(parser):
            parser.add_argument("--only", action="append")

        return run(str(path), "Is it?", cases, add_options, arguments, grows=("only",))

    now = [0.0]  # each case takes a minute
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: now[0])
    started.measured, started.stops = measured, stops
    started.record, started.out = path.with_suffix(".csv"), str(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return started


def test_there_is_a_script_for_every_committed_table():
    assert len(QUESTIONS) == 14
    for path in FOLDER.glob("*.csv"):
        assert {path.stem, path.stem.removesuffix("_on_gpu")} & {*QUESTIONS}
        rows = read_table(path)
        assert rows and all(tuple(row) == COLUMNS and row["value"] for row in rows)


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_script_measures_a_tiny_case(question, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module(question)
    # processes take seconds to start, and are tested on their own
    alone = {
        "measure": Measured(0.001, 10, 0.002, 1, 0.95),
        "measure_head": [("milliseconds", 1.0)],
    }
    alone["measured_on_ranks"] = {"seconds": 0.001, "messages": 7, "bytes": 400}
    for name, found in alone.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *_, found=found, **__: found)
    options = getattr(module, "add_options", lambda parser: None)
    arguments = ["--smoke", "--out", str(tmp_path / "run")]
    assert run(module.__file__, module.__doc__, module.cases, options, arguments) == 0
    rows = read_table(tmp_path / "run" / "table.csv")
    assert rows and all(tuple(row) == COLUMNS and row["value"] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_what_needs_a_gpu_is_refused_without_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    on_gpu = [name for name in QUESTIONS if name.endswith("_on_gpu")]
    assert len(on_gpu) == 3
    for question in on_gpu:
        module = importlib.import_module(question)
        options = getattr(module, "add_options", lambda parser: None)
        assert run(module.__file__, module.__doc__, module.cases, options, []) == 2
        assert "needs a CUDA device" in capsys.readouterr().err


def test_a_run_leaves_the_record_alone_unless_it_is_asked_to_replace_it(script, capsys):
    script.record.write_text("old")
    assert script("--out", script.out) == 0
    assert script.record.read_text() == "old"
    assert f"Table: {script.out}/table.csv" in capsys.readouterr().out
    assert script("--out", script.out + "-2", "--record") == 0
    rows = read_table(script.record)
    assert [row["layer"] for row in rows] == ["first", "first", "second", "second"]
    assert rows[0]["value"] == "0.125" and rows[0]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["question", "question_on_gpu"])
def test_a_gpu_has_a_record_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr("softsphere_lab.records.environment.gpu_name", lambda device: None)

    def cases(options):
        return [Case("one", lambda: [Row("one", SETTING, "seconds", 0.125)])]

    given = ["--out", str(tmp_path / "run"), "--record"]
    assert run(str(tmp_path / f"{name}.py"), "", cases, arguments=given, device="cuda:0") == 0
    assert [path.name for path in tmp_path.glob("*.csv")] == ["question_on_gpu.csv"]
    assert read_table(tmp_path / "question_on_gpu.csv")[0]["machine"] == "a GPU"


def test_a_second_run_has_a_folder_of_its_own_and_overwrites_none(script, capsys):
    assert script("--out", script.out) == 0
    assert script("--out", script.out) == 2
    assert "is not empty; pass --resume" in capsys.readouterr().err
    assert script() == 0
    assert list(Path("runs").glob("*-question/table.csv"))


def test_a_stopped_run_goes_on_with_what_is_missing(script, capsys):
    script.stops.append(True)
    assert script("--out", script.out) == 130
    said = capsys.readouterr().out
    assert f"--resume --out {script.out}" in said
    rows = read_table(Path(script.out) / "table.csv")
    assert [row["layer"] for row in rows] == ["first", "first"]
    script.stops.clear()
    assert script("--out", script.out, "--resume") == 0
    assert script.measured == ["first", "second", "second"]
    rows = read_table(Path(script.out) / "table.csv")
    assert [row["layer"] for row in rows] == ["first", "first", "second", "second"]


def test_cases_that_would_begin_too_late_are_left_to_the_next_start(script, capsys):
    arguments = ["--out", script.out, "--resume", "--minutes", "0.5"]
    script.record.write_text("old")
    assert script(*arguments, "--record") == UNFINISHED
    said = capsys.readouterr().out
    assert "The 0.5 minutes are over, and 1 of 2 cases are not measured" in said
    assert f"--resume --out {script.out}" in said
    assert script.record.read_text() == "old"  # which a part of the table must not replace
    assert script.measured == ["first"]
    assert script(*arguments) == 0
    assert script.measured == ["first", "second"]
    assert "are over" not in capsys.readouterr().out
    rows = read_table(Path(script.out) / "table.csv")
    assert [row["layer"] for row in rows] == ["first", "first", "second", "second"]
    with pytest.raises(SystemExit):
        script("--minutes", "0")


def test_a_folder_may_begin_with_resume_and_grow_by_what_is_measured_one_by_one(script, capsys):
    for only in ("second", "first"):
        assert script("--out", script.out, "--resume", "--only", only) == 0
    assert script.measured == ["second", "first"]
    rows = read_table(Path(script.out) / "table.csv")
    assert [row["layer"] for row in rows] == ["second", "second", "first", "first"]
    config = json.loads((Path(script.out) / "config.json").read_text())
    assert config["only"] == ["second", "first"]
    assert script("--out", script.out, "--resume") == 0
    assert script.measured == ["second", "first"]


def test_resume_begins_in_no_folder_that_holds_something_else(script, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("dear")
    assert script("--out", script.out, "--resume") == 2
    assert "is not empty and no run folder" in capsys.readouterr().err
    assert not script.measured


def test_times_of_another_machine_do_not_join_a_table(script, monkeypatch, capsys):
    script.stops.append(True)
    script("--out", script.out)
    there = benchmark.host() | {"machine": "another"}
    monkeypatch.setattr(benchmark, "host", lambda device: there)
    assert script("--out", script.out, "--resume") == 2
    assert "was made with machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume"], "--resume needs --out"),
        (["--smoke", "--record"], "leave --smoke out"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["all"], "unrecognized arguments: all"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(script, arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        script(*arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not script.measured


def test_the_run_folder_says_what_was_started(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/question.py", "--out", script.out])
    script("--out", script.out)
    environment = json.loads((Path(script.out) / "environment.jsonl").read_text())
    assert environment["command"] == f"python benchmarks/question.py --out {script.out}"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("softmax at D = 9 takes more than 60 s", "softmax at D = 9 takes more than 60 s"),
        (
            "x failed:\nTraceback\n  a line\ntorch.OutOfMemoryError: no room",
            "torch.OutOfMemoryError: no room",
        ),
        (
            "x failed:\ntorch._dynamo.exc.BackendCompilerFailed: no\nRuntimeError: not that\n\n"
            "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace",
            "RuntimeError: not that",
        ),
    ],
)
def test_a_layer_is_left_out_for_the_reason_that_its_process_gave(said, told):
    assert left_out("x", SETTING, LabError(said)).value == told


@pytest.fixture
def heads(monkeypatch):
    """The script of heads, with what is measured of a layer and the error that ends it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("language_model_heads_on_gpu")

    def measured(found, error=None):
        started = []

        def measure_head(name, *_, **__):
            started.append(name)
            yield from found
            if error is not None:
                raise error

        monkeypatch.setattr(module, "measure_head", measure_head)
        return started

    measured.rows = lambda name: [
        (row.measure, row.value)
        for row in module.compared("tiny", name, SETTING, Effort(), "cpu", "bfloat16")
    ]
    measured.module = module
    return measured


def test_no_process_is_started_for_a_peer_that_is_missing(heads, monkeypatch):
    monkeypatch.setattr(softmax_peers, "find_spec", lambda module: None)
    monkeypatch.delattr(softmax_peers.F, "linear_cross_entropy", raising=False)
    started = heads([(measure, 1.0) for measure in measures_of("gram", "cpu")])
    assert heads.rows("quack") == [("left out", "quack-kernels is not installed")]
    reason = f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"
    assert heads.rows("core, automatic") == [("left out", reason)]
    assert not started
    assert len(heads.rows("gram")) == 6 and started == ["gram"]


def test_a_peer_that_was_missing_is_looked_for_again(tmp_path, heads):
    """A package may have been installed since; what was measured stays."""
    there = []

    def listed(_):
        def peer():
            if there:
                yield Row("peer", SETTING, "milliseconds", 2.0)
            else:
                yield left_out("peer", SETTING, "it is not installed", again=True)

        return [Case("own", lambda: [Row("own", SETTING, "milliseconds", 1.0)]), Case("peer", peer)]

    folder = tmp_path / "run"
    for values in (["1", "it is not installed"], ["1", "2"], ["1", "2"]):
        given = ["--out", str(folder), "--resume"]
        assert run("x.py", "", listed, arguments=given) == 0
        assert [row["value"] for row in read_table(folder / "table.csv")] == values
        there.append(True)


def test_a_softmax_that_this_pytorch_lacks_is_left_out_on_a_cpu_as_well(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("gram_vs_softmax")
    monkeypatch.delattr(softmax_peers.F, "linear_cross_entropy", raising=False)
    monkeypatch.setattr(module, "measure", lambda *_, **__: Measured(0.5, 10, 0.5))
    rows = list(module.compared(SETTING, Effort()))
    core = [f"core, {how}" for how in ("chunk 64", "chunk 256", "chunk 1024", "automatic")]
    assert [row.layer for row in rows if row.measure == "left out"] == core
    assert rows[-1].value == 1.0


def test_what_a_head_had_measured_is_in_the_table_with_what_is_missing(heads):
    error = LabError("x failed:\ntorch.OutOfMemoryError: no room")
    heads([("milliseconds", 1.5), ("extra MiB", "RuntimeError: no")], error)
    missing = ", ".join(measures_of("softmax", "cpu")[2:])
    assert heads.rows("softmax") == [
        ("milliseconds", 1.5),
        ("left out", "extra MiB: RuntimeError: no"),
        ("left out", f"{missing}: torch.OutOfMemoryError: no room"),
    ]
    # a process that fails as it leaves has lost nothing
    whole = [(measure, 1.0) for measure in measures_of("softmax", "cpu")]
    heads(whole, error)
    assert heads.rows("softmax") == whole
    heads([], error)
    assert heads.rows("softmax") == [("left out", "torch.OutOfMemoryError: no room")]


@pytest.mark.parametrize("script", ["language_model_heads_on_gpu", "factored_on_gpu"])
def test_a_command_for_a_gpu_ends_in_time(script, monkeypatch):
    """The last process that is begun may take all of its time."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module(script)
    assert 60 * module.MINUTES + module.PATIENCE < 8 * 60
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    assert parser.get_default("minutes") == module.MINUTES


@pytest.fixture
def factored():
    """The benchmark of the factored layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("factored_on_gpu")


def test_a_table_has_what_follows_from_its_rows_once_they_are_there(tmp_path, capsys, factored):
    """The steps of a factored layer are timed first, and the others are so many times as long."""
    module = factored
    times = {module.CAPTURED: 2.0, "another": 6.0, module.FACTORED: 4.0}
    listed = [
        Case(name, lambda name=name, x=x: [Row(name, SETTING, module.MILLISECONDS, x)])
        for name, x in times.items()
    ]
    arguments = ["--out", str(tmp_path / "run")]
    assert run("x.py", "", lambda _: listed, arguments=arguments, derived=module.ratios) == 0
    rows = [
        (row["layer"], row["measure"], float(row["value"]))
        for row in read_table(tmp_path / "run/table.csv")
    ]
    assert rows[3:] == [
        ("another", f"times {module.CAPTURED}", 3.0),
        ("another", f"times {module.FACTORED}", 1.5),
    ]
    assert capsys.readouterr().out.count(f"times {module.CAPTURED}: 3") == 1


def followed(module, times: dict[str, float], shares: dict[str, float], more: list[Row] = ()):
    """What follows from milliseconds and from shares of replayed steps, by layer and measure."""
    rows = [Row(name, SETTING, module.MILLISECONDS, x) for name, x in times.items()]
    rows += [Row(name, SETTING, module.REPLAYED, x) for name, x in shares.items()]
    found = module.ratios([row.cells() for row in (*rows, *more)])
    return {(row.layer, row.measure): row.value for row in found}


def test_the_fastest_softmax_is_told_once_each_is_timed_or_left_out(factored):
    first, *others = factored.SOFTMAX_ON_GPU
    slow = left_out(others[0], SETTING, "it takes too long")
    times = dict(zip(others[1:], range(7, 20), strict=False)) | {factored.CAPTURED: 2.0}
    found = followed(factored, times, {}, [slow])
    assert not any(layer == factored.FASTEST for layer, _ in found)
    found = followed(factored, times | {first: 8.0}, {}, [slow])
    assert found[factored.FASTEST, "is"] == others[1]
    assert found[factored.FASTEST, f"times {factored.CAPTURED}"] == 3.5
    assert found[first, f"times {factored.CAPTURED}"] == 4.0


def test_steps_that_were_not_replayed_have_no_ratio_and_it_is_said_why(factored):
    captured = next(name for name in factored.SOFTMAX_ON_GPU if name.endswith("captured"))
    times = dict.fromkeys(factored.SOFTMAX_ON_GPU, 9.0)
    times |= {captured: 6.0, factored.CAPTURED: 2.0, factored.FACTORED: 4.0}
    ours, eager = (f"times {name}" for name in factored.OWN)
    found = followed(factored, times, {captured: 0.9, factored.CAPTURED: 0.9})
    assert found[factored.FASTEST, ours] == 3.0 and found[factored.FASTEST, eager] == 1.5
    assert found[captured, ours] == 3.0
    found = followed(factored, times, {captured: 0.89, factored.CAPTURED: 1.0})
    assert found[captured, "left out"] == "no ratios: 89% of the steps were replayed"
    assert found[factored.FASTEST, ours] == 4.5 and (captured, ours) not in found
    found = followed(factored, times, {captured: 1.0, factored.CAPTURED: 0.5})
    assert found[factored.CAPTURED, "left out"] == "no ratios: 50% of the steps were replayed"
    assert {measure for _, measure in found} == {"left out", "is", eager}


def test_a_captured_step_says_how_it_was_taken(factored, monkeypatch):
    measured = Measured(0.001, None, 0.002, 3, 0.95)
    monkeypatch.setattr(factored, "measure", lambda *_, **__: measured)
    rows = {row.measure: row.value for row in factored.timed("x", SETTING, None, "cpu")}
    assert rows == {
        "milliseconds": 1.0,
        "mean milliseconds": 2.0,
        "graphs captured": 3,
        "share of steps replayed": 0.95,
    }
    measured = Measured(0.001, None, 0.002)
    assert len(list(factored.timed("x", SETTING, None, "cpu"))) == 2
