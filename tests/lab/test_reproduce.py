"""Every experiment at its smallest budget, and what is said of records."""

from __future__ import annotations

import json
import math
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from softsphere_lab.cli import app as cli
from softsphere_lab.experiments import ablation, classes
from softsphere_lab.experiments import image_sections as vision
from softsphere_lab.experiments import measures as tables
from softsphere_lab.experiments import page as report
from softsphere_lab.experiments import text_sections as language
from softsphere_lab.experiments.experiment import BUDGETS, Ran, StudyExperiment
from softsphere_lab.experiments.registry import EXPERIMENTS
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.folder import Record, write
from softsphere_lab.study.search import Axis

STUDIES = {
    name: experiment
    for name, experiment in EXPERIMENTS.items()
    if isinstance(experiment, StudyExperiment)
}


DATA = {"words": 10, "train": 100, "test": 50}


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def command(*arguments: str) -> int:
    sys.argv = ["softsphere", *arguments]
    return cli.main()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_at_its_smallest_budget_without_network(
    name, tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("SOFTSPHERE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert command("reproduce", name, "--budget", "smoke") == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "records").iterdir()
    assert folder.name.endswith(f"-{name}-smoke")
    assert json.loads((folder / "config.json").read_text())["experiment"] == name
    record, experiment = Record(folder), EXPERIMENTS[name]
    assert experiment.finished(record) == ""
    section = experiment.section(record)
    assert section is not None and section.finding in said and section.pictures
    assert (folder / "table.md").read_text() == section.text
    for picture in section.pictures:
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    # a second run refuses to mix its numbers with these, and resuming has nothing to do
    assert command("reproduce", name, "--budget", "smoke") == 2
    assert "not empty" in capsys.readouterr().err
    before = (folder / "metrics.jsonl").read_bytes()
    assert command("reproduce", name, "--budget", "smoke", "--resume") == 0
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", STUDIES)
def test_budgets_grow_and_every_name_is_its_own_output(name):
    studies = STUDIES[name].studies
    assert tuple(studies) == BUDGETS
    runs = [len(studies[budget].names) * len(studies[budget].seeds) for budget in BUDGETS]
    assert runs[0] < runs[1] <= runs[2]
    for study in studies.values():
        assert len(set(study.names)) == len(study.names)
        # the same search for all: along the same rates, from the same one
        assert len({study.space(each).axes["lr"] for each in study.names}) == 1
        for each in study.names:
            space = study.space(each)
            assert all(axis.start in axis.values for axis in space.axes.values())
            setting, lr = study.setting(each, space.start)
            assert setting.split(":")[0].split()[0] == each.split(":")[0].split()[0]
            assert lr == space.axes["lr"].start


@pytest.mark.parametrize(
    "output",
    [output for name in ("ptb", "wikipedia", "ablation", "classes")
     for output in STUDIES[name].studies["full"].outputs],
    ids=str,
)  # fmt: skip
def test_the_name_of_an_output_layer_is_read_back(output):
    assert Output.parse(str(output)) == output
    axes = output.axes(Axis((0.01, 0.1), 0.01))
    candidate = output.at({name: axis.start for name, axis in axes.items()})
    assert Output.parse(str(candidate)) == candidate
    assert candidate.axes(Axis.fixed(0.1)) == {}


def test_full_mnist_has_the_losses_and_seeds_that_are_promised():
    full = STUDIES["mnist"].studies["full"]
    assert len(full.seeds) >= 10
    assert {*full.names} >= {
        "softmax",
        "taylor_softmax",
        "higher_taylor_softmax:order=4",
        "spherical_softmax",
        "z_loss",
        "squared_error",
        "bohning_bound",
        "bouchard_bound",
        "soft_margin_softmax",
        "soft_margin_softmax:order=2",
    }


WRONG = {
    "name": (["imagenet"], "NAME must be one of mnist, cifar10"),
    "budget": (["mnist", "--budget", "huge"], "--budget must be one of smoke, small, full"),
    "no name": ([], "NAME must be one of mnist, "),
    "jobs": (["mnist", "--jobs", "0"], "--jobs must be at least 1"),
    "jobs for what is timed": (["scaling", "--jobs", "2"], "--jobs must be 1 for scaling"),
    "data for random rows": (
        ["scaling", "--data-dir", "."],
        "--data-dir has no meaning for scaling",
    ),
    "too many jobs": (["mnist", "--jobs", "5000"], "--jobs must be at least 1 and at most"),
    "device": (["mnist", "--budget", "smoke", "--device", "tpu9"], "--device tpu9"),
    "device for timing": (["scaling", "--budget", "smoke", "--device", "meta"], "--device"),
    "folder": (["ptb", "--data-dir", "nowhere"], "nowhere"),
    "nothing to resume": (["ptb", "--budget", "smoke", "--resume"], "leave --resume out"),
    "no folder": (["ptb", "--out", ""], "--out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, words = WRONG[case]
    assert command("reproduce", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("softsphere: ") and len(said.splitlines()) == 1
    assert words in said
    assert list(tmp_path.iterdir()) == []


def end(loss: str, seed: int, nll: float, **more) -> dict:
    final = {
        "engine": "gram",
        "best_epoch": 1,
        "valid_nll": nll,
        "valid_mrr": 0.1,
        "test_nll": nll,
        "test_top1": 0.1,
        "test_top10": 0.2,
        "test_mrr": 0.15,
        "simlex999": 0.1,
        "simlex999_pairs": 7,
        "wordsim353": None,
        "wordsim353_pairs": 2,
        "seconds": 3.0,
        "diverged": False,
        **more,
    }
    return {"loss": loss, "setting": loss, "lr": 0.01, "seed": seed, "final": final}


def ran(ends: list[dict], each_epoch: list[dict] = (), **config) -> Ran:
    found: dict[str, dict[int, dict]] = {}
    for line in ends:
        found.setdefault(line["loss"], {})[line["seed"]] = line
    asked = {
        **STUDIES["ptb"].studies["small"].config(),
        "data": DATA,
        "model": "lenet",
        **config,
    }
    return Ran(asked, found, list(each_epoch), [])


def test_ratios_and_tests_are_paired_by_seed_and_network():
    # the seeds differ by much more than the losses, which only pairs can see
    base = [4.0, 5.0, 6.0, 7.0]
    ends = [end("softmax lstm", seed, nll) for seed, nll in enumerate(base)]
    ends += [end("taylor_softmax lstm", seed, nll + 0.1 + 0.001 * seed)
             for seed, nll in enumerate(base)]  # fmt: skip
    ends += [end("softmax", seed, 1.0 + seed) for seed in range(4)]
    found = ran(ends)
    reference = {name: language.of_softmax(name) for name in found.ends}
    assert reference["taylor_softmax lstm"] == "softmax lstm"
    middle, low, high = tables.ratio(
        found.ends, "taylor_softmax lstm", "softmax lstm", language.PERPLEXITY
    )
    assert middle == pytest.approx(math.exp(0.1015)) and low < middle < high < math.exp(0.105)
    p = tables.p_values(found.ends, language.PERPLEXITY, reference)
    # of perplexities, which differ in proportion, the test would see but the seeds
    assert p["taylor_softmax lstm"] < 1e-4
    assert tables.p_values(found.ends, language.MRR, reference)["taylor_softmax lstm"] == 1.0
    assert "softmax lstm" not in p
    assert "log-Taylor softmax, LSTM 1.107 (1.105 to 1.109)" in language.ratios(found, reference)


def test_a_missing_seed_pairs_nothing_and_one_seed_has_no_interval():
    found = ran([end("softmax", 0, 4.0), end("taylor_softmax", 1, 5.0)])
    assert tables.ratio(found.ends, "taylor_softmax", "softmax", language.PERPLEXITY) is None
    assert tables.p_values(found.ends, language.PERPLEXITY, {"taylor_softmax": "softmax"}) == {}
    one = ran([end("softmax", 0, 4.0), end("taylor_softmax", 0, 5.0)])
    middle, low, high = tables.ratio(one.ends, "taylor_softmax", "softmax", language.PERPLEXITY)
    assert middle == pytest.approx(math.e) and math.isnan(low) and math.isnan(high)
    assert tables.told(one.ends["softmax"], language.PERPLEXITY) == "54.6"


def test_seconds_to_a_perplexity_are_between_epochs():
    def epoch(number, nll, seconds=10.0, seed=0):
        return {"loss": "softmax", "seed": seed, "epoch": number, "valid_nll": nll,
                "seconds": seconds}  # fmt: skip

    epochs = [epoch(1, 6.0), epoch(2, 5.0), epoch(3, 4.0)]
    found = ran([end("softmax", 0, 4.0)], epochs)
    assert language.seconds_to(found, "softmax", math.exp(4.5)) == "25"
    assert language.seconds_to(found, "softmax", math.exp(6.5)) == "≤ 10"
    assert language.seconds_to(found, "softmax", math.exp(3.9)) == "–"
    # one seed that does not come there is enough
    both = ran([end("softmax", 0, 4.0), end("softmax", 1, 4.0)], [*epochs, epoch(1, 4.9, seed=1)])
    assert language.seconds_to(both, "softmax", math.exp(4.5)) == "–"


def test_a_loss_without_probabilities_has_ranks_alone():
    found = ran([end("softmax", 0, 4.0), end("z_loss", 0, 1.0, valid_nll=None, test_nll=None)])
    row = next(x for x in language.tell(found).table.splitlines() if x.startswith("| Z-loss"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[6:8] == ["–", "–"] and cells[10] == "0.1500"
    assert "Z-loss" not in language.tell(found).finding


def test_the_paper_stands_beside_its_own_data_alone():
    found = ran([end("softmax", 0, 4.0)])
    assert "126.7" in language.tell(found).table
    assert "126.7" not in language.tell(ran([end("softmax", 0, 4.0)], dataset="wikipedia")).table


def test_classes_say_where_the_order_turns():
    ends = []
    for D, gap in ((10, -0.1), (100, 0.2)):
        for seed in range(3):
            ends.append(end(f"softmax classes={D}", seed, 3.0 + 0.01 * seed))
            ends.append(end(f"taylor_softmax prior classes={D}", seed, 3.0 + gap + 0.011 * seed))
    found = classes.tell(ran(ends)).finding.splitlines()
    assert found[2:] == [
        "- log-Taylor softmax, base measure: 0.906 at 10 classes and 1.223 at 100; interval below "
        "1 at 10; interval above 1 at 100; p < 0.05 at 10, 100."
    ]
    # one seed has neither an interval nor a test
    alone = classes.tell(ran([line for line in ends if line["seed"] == 0])).finding
    assert alone.endswith("base measure: 0.905 at 10 classes and 1.221 at 100.")
    # lower on average, by less than chance
    alike = [end(f"{loss} classes=10", seed, 3.0 + (seed + (loss != "softmax")) % 3 * 0.01
                 - 0.001 * (loss != "softmax"))
             for loss in ("softmax", "taylor_softmax") for seed in range(3)]  # fmt: skip
    assert classes.tell(ran(alike)).finding.endswith("softmax: 0.999 at 10 classes.")


def test_the_ratios_by_classes_are_told_by_the_interval_and_by_the_test_each():
    """Many comparisons, of which none is sure: intervals apart from 1, no p below 0.05."""
    spread = (-0.02, 0.0, 0.03)
    ends = []
    for D in range(10, 30):
        for seed in range(3):
            ends.append(end(f"softmax classes={D}", seed, 3.0))
            ends.append(end(f"taylor_softmax classes={D}", seed, 3.1 + spread[seed]))
    found = classes.tell(ran(ends)).finding
    assert "interval above 1 at 10, 11," in found and "p <" not in found


def test_the_ablation_compares_on_the_same_network():
    ends = [
        end(f"{loss} depth={depth} activation=relu", seed, 4.0 + (loss != "softmax") * 0.1 * depth)
        for loss in ("softmax", "taylor_softmax")
        for depth in (1, 2)
        for seed in range(3)
    ]
    found = ablation.tell(ran(ends))
    assert "1.105 (log-Taylor softmax, relu, depth 1) to 1.221" in found.finding
    assert "none was shown to be below" in found.finding and "Without a run" not in found.finding


def test_the_ablation_names_what_it_cannot_compare_and_draws_a_gap(tmp_path, recwarn):
    ends = [
        end(f"{loss} depth={depth} activation=exp", seed, 4.0 + 0.01 * seed,
            diverged=depth == 3 and loss != "softmax")
        for loss in ("softmax", "taylor_softmax")
        for depth in (2, 3)
        for seed in range(3)
    ]  # fmt: skip
    found = ablation.tell(ran(ends))
    assert found.finding.endswith("none is done: log-Taylor softmax, exp, depth 3.")
    found.pictures["networks"](tmp_path / "networks.png")
    assert not [str(warning.message) for warning in recwarn if "empty" in str(warning.message)]


def test_a_record_in_part_says_how_much_of_it_there_is(tmp_path):
    experiment = STUDIES["ptb"]
    small = experiment.studies["small"]
    config = {"experiment": "ptb", "budget": "small", **small.config(), "data": DATA}
    record = Record.create(tmp_path / "2026-01-01-ptb-small", config)
    record.add("metrics.jsonl", [end("softmax", 0, 4.0)])
    runs = len(small.names) * len(small.seeds)
    lacking = f"0 of {runs} final runs are finished"
    # a final run counts when the search that chose it is there
    told = experiment.finished(record)
    assert told.startswith(lacking) and "missing: softmax (3), softmax, base measure (3)" in told
    page = report.markdown(tmp_path)
    assert f"**{told}**" in page and "## Penn Treebank" in page
    # more is better, and smoke is nothing to report
    full = Record.create(tmp_path / "2025-01-01-ptb", {**config, "budget": "full"})
    full.add("metrics.jsonl", [end("softmax", 0, 4.5)])
    smoke = Record.create(tmp_path / "2027-01-01-ptb-smoke", {**config, "budget": "smoke"})
    smoke.add("metrics.jsonl", [end("softmax", 0, 5.5)])
    assert [record.folder for _, record, _ in report.sections(tmp_path)] == [full.folder]
    # one without a final run has nothing to say
    Record.create(tmp_path / "2028-01-01-ptb", {**config, "budget": "full"})
    assert [record.folder for _, record, _ in report.sections(tmp_path)] == [full.folder]
    # of two alike the last
    last = Record.create(tmp_path / "2029-01-01-ptb", {**config, "budget": "full"})
    last.add("metrics.jsonl", [end("softmax", 0, 4.6)])
    assert [record.folder for _, record, _ in report.sections(tmp_path)] == [last.folder]


def test_report_writes_the_page_and_its_pictures(tmp_path, capsys):
    records, docs = tmp_path / "records", tmp_path / "docs"
    assert command("report", "--records", str(records), "--docs", str(docs)) == 2
    assert "no such folder" in capsys.readouterr().err
    records.mkdir()
    (docs / "results").mkdir(parents=True)
    (docs / "results" / "mine.png").write_bytes(b"mine")
    (docs / "results.md").write_text("mine")
    assert command("report", "--records", str(records), "--docs", str(docs)) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert (docs / "results.md").read_text() == "mine"
    study = replace(STUDIES["ptb"].studies["small"], seeds=(0,))
    config = {"experiment": "ptb", "budget": "small", **study.config(), "data": DATA}
    record = Record.create(records / "r", config)
    epoch = {"loss": "softmax", "setting": "softmax", "lr": 0.01, "seed": 0, "epoch": 1,
             "train_loss": 4.0, "valid_nll": 4.0, "valid_mrr": None, "seconds": 2.0}  # fmt: skip
    record.add("metrics.jsonl", [epoch, end("softmax", 0, 4.0)])
    # a folder of something else is in nobody's way
    write(Record.create(records / "other", {"dataset": "digits"}).folder / "x", "")
    assert command("report", "--records", str(records), "--docs", str(docs)) == 0
    assert (docs / "results.md").read_text() == report.markdown(records)
    assert (docs / "results" / "ptb-curves.png").read_bytes().startswith(b"\x89PNG")
    assert "(results/ptb-curves.png)" in (docs / "results.md").read_text()
    assert (record.folder / "table.md").read_text() in (docs / "results.md").read_text()
    assert (record.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (records / "other" / "table.md").exists()
    assert (docs / "results" / "mine.png").read_bytes() == b"mine"
    (tmp_path / "file").write_text("")
    assert command("report", "--records", str(records), "--docs", str(tmp_path / "file")) == 2
    assert "--docs" in capsys.readouterr().err


def test_vision_marks_what_diverged():
    final = {"best_epoch": 0, "valid_error": 0.9, "mean_valid_error": 0.9, "test_error": 0.9,
             "test_nll": None, "seconds": 1.0, "diverged": True}  # fmt: skip
    line = {"loss": "softmax", "setting": "softmax", "lr": 0.1, "seed": 0, "final": final}
    found = ran([line], epochs=1)
    assert "| 1 (1 diverged) |" in vision.tell(found).table


def test_a_run_that_diverged_is_counted_and_is_in_no_mean_test_or_sentence():
    ends = [end("softmax depth=1 activation=exp", seed, 4.0 + 0.01 * seed) for seed in range(3)]
    ends += [
        end("taylor_softmax depth=1 activation=exp", seed, 9.0, diverged=True) for seed in range(3)
    ]
    found = ablation.tell(ran(ends))
    row = next(line for line in found.table.splitlines() if "Taylor" in line)
    assert "| 0 | 3 (3 diverged) | – | – | – |" in row
    assert found.finding == "Nothing can be compared with softmax yet."


@pytest.mark.parametrize("nll", [800.0, math.inf])
def test_a_likelihood_beyond_numbers_is_told_as_infinite(nll, tmp_path):
    epoch = {"loss": "softmax", "seed": 0, "epoch": 1, "valid_nll": nll, "seconds": 1.0}
    for experiment in ("ptb", "ablation", "classes"):
        words = {"ptb": "", "ablation": " depth=1 activation=relu", "classes": " classes=10"}
        ends = [end(f"{loss}{words[experiment]}", 0, nll if loss == "softmax" else 4.0)
                for loss in ("softmax", "taylor_softmax")]  # fmt: skip
        each = {**epoch, "loss": f"softmax{words[experiment]}"}
        section = STUDIES[experiment].tell(ran(ends, [each]))
        assert "| inf |" in section.table
        for name, draw in section.pictures.items():
            draw(tmp_path / f"{name}.png")
    study = STUDIES["ptb"].studies["full"]
    assert "perplexity inf" in study.told({"valid_nll": nll, "valid_mrr": 0.1, "seconds": 1.0,
                                           "diverged": False})  # fmt: skip


def test_one_perplexity_to_come_to_is_for_all_and_one_for_half():
    ends = {"softmax": 143.0, "taylor_softmax": 201.0, "spherical_softmax": 235.0}
    lines = [end(name, 0, math.log(value)) for name, value in ends.items()]
    assert language.goals_of(ran(lines)) == [240, 210]
    # without probabilities, and beyond numbers, there is nothing to come to
    others = [end("z_loss", 0, 1.0, valid_nll=None), end("squared_error", 0, math.inf)]
    assert language.goals_of(ran([*lines, *others])) == [240, 210]
    assert language.goals_of(ran(lines[:1])) == [150]


def test_ranks_alone_have_no_perplexity_to_come_to():
    found = language.tell(ran([end("z_loss", 0, 1.0, valid_nll=None, test_nll=None)]))
    assert "nan" not in found.text
    assert "seconds an epoch" in found.text and "seconds to" not in found.text


def test_a_text_that_is_too_small_is_refused_before_a_folder_is_made(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.chdir(tmp_path)
    for part in ("train", "validation", "test"):
        rows = datasets.Dataset.from_dict({"sentence": ["a b c"] * 50})
        (tmp_path / "data" / "ptb").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "data" / "ptb" / f"{part}.parquet")
    assert command("reproduce", "ablation", "--data-dir", "data") == 2
    said = capsys.readouterr().err
    assert "ptb has 200 words to train on, and this budget reads 200,000" in said
    assert not (tmp_path / "records").exists()


def test_vision_says_which_losses_differ_and_no_more():
    def final(error):
        return {"best_epoch": 1, "valid_error": error, "mean_valid_error": error,
                "test_error": error, "test_nll": None, "seconds": 1.0,
                "diverged": False}  # fmt: skip

    ends = []
    for seed in range(4):
        wobble = 0.001 * (seed % 2)
        for loss, error in (
            ("softmax", 0.10 + wobble),
            ("taylor_softmax", 0.08 + wobble + 0.0001 * seed),
            ("z_loss", 0.101 - wobble),
        ):
            ends.append({"loss": loss, "setting": loss, "lr": 0.1, "seed": seed,
                         "final": final(error)})  # fmt: skip
    found = vision.tell(ran(ends)).finding
    assert found.startswith(
        "Better than softmax (10.05 %): log-Taylor softmax (8.07 %, p < 0.001)."
    )
    assert "Not shown to differ from softmax (10.05 %): Z-loss." in found
    few = vision.tell(ran([line for line in ends if line["seed"] < 2])).finding
    assert few.startswith("No loss was tested")


def test_better_and_worse_are_of_the_seeds_that_p_is_of():
    def final(error):
        return {"best_epoch": 1, "valid_error": error, "mean_valid_error": error,
                "test_error": error, "test_nll": None, "seconds": 1.0,
                "diverged": False}  # fmt: skip

    errors = {
        "softmax": [0.12, 0.1201, 0.1202, *[0.08] * 7],
        "taylor_softmax": [0.11, 0.1102, 0.1101],
    }
    ends = [
        {"loss": loss, "setting": loss, "lr": 0.01, "seed": seed, "final": final(error)}
        for loss, own in errors.items()
        for seed, error in enumerate(own)
    ]
    assert vision.tell(ran(ends)).finding.startswith("Better than softmax")


def test_the_page_of_results_is_what_the_records_make():
    root = Path(__file__).parents[2]
    page = root / "docs" / "results.md"
    assert page.read_text() == report.markdown(root / "records")
    drawn = {
        f"{experiment.name}-{name}.png"
        for experiment, _, section in report.sections(root / "records")
        for name in section.pictures
    }
    assert {path.name for path in (root / "docs" / "results").iterdir()} == drawn
