"""A record is filled by processes that train each run together, and by nobody else."""

from __future__ import annotations

import signal
import sys
from dataclasses import fields, replace

import pytest
import torch

import _ranks
from _lab_studies import TEXT
from _stopped_commands import kept_lines, start, stop
from _trained_on_ranks import Ending, Failing
from softsphere_lab.errors import LabError
from softsphere_lab.models.output_layers import Output
from softsphere_lab.progress import standard_console
from softsphere_lab.records.folder import Record
from softsphere_lab.study import on_ranks, work
from softsphere_lab.study import protocol as study
from softsphere_lab.study.ledger import checkpoint_of, planned

pytestmark = [
    pytest.mark.once("ranks are on the CPU"),
    pytest.mark.skipif(not _ranks.AVAILABLE, reason="needs gloo"),
]


def asked(kind, nproc, **more):
    given = {each.name: getattr(TEXT, each.name) for each in fields(TEXT)} | more
    return kind(**given).over_processes(nproc)


def filled(asked, folder):
    """The record of a study."""
    record = Record.create(folder, asked.config(), asked.nproc)
    work.work(asked, asked.load(), record, standard_console())
    return record


def losses(record):
    """The losses in a record. Ranks may differ where two words are about as likely."""
    lines = [{**line, **line.get("final", {})} for line in record.lines(study.RUNS)]
    return [[x.get(key) for key in ("train_loss", "valid_nll", "test_nll")] for x in lines]


def test_a_record_is_filled_by_two_processes_and_by_one_after_the_second_is_killed(
    tmp_path, capfd, monkeypatch
):
    shown = []

    class Seen(work.Phases):
        def describe(self, searching, what):
            shown.append(what)

    monkeypatch.setattr(work, "Phases", Seen)
    setup = replace(TEXT.setup, epochs=1)
    two = asked(Ending, 2, setup=setup, outputs=(Output("softmax"), Output("taylor_softmax")))
    with pytest.raises(LabError, match=r"process 1 of --nproc 2 was ended by SIGKILL") as error:
        filled(two, tmp_path / "two")
    assert f"--resume --out {tmp_path / 'two'} does the rest" in str(error.value)
    assert capfd.readouterr().out.count("[run 1 of 4] softmax lr 0.003 seed 0") == 1
    assert shown.count("softmax lr 0.003 seed 0  epoch 1 of 1") == 1
    record = Record.reopen(tmp_path / "two", two.config(), two.grows)
    before = kept_lines(record.folder)
    assert planned(two, record).finals == 2
    assert [line["nproc"] for line in record.lines("environment.jsonl")] == [2, 1]
    one = replace(two, nproc=1)
    work.work(one, one.load(), record, standard_console())
    assert before <= kept_lines(record.folder)
    # nothing is left to do, and no process is begun for it
    monkeypatch.delattr(on_ranks, "spawn")
    work.work(two, two.load(), record, standard_console())
    whole = filled(one, tmp_path / "one")
    eps = torch.finfo(torch.float32).eps
    # a sum over some hundred rows, in each of some hundred steps of Adam
    torch.testing.assert_close(losses(record), losses(whole), rtol=1e4 * eps, atol=1e4 * eps)


@pytest.mark.slow
def test_what_a_process_refuses_and_its_faults_are_those_of_the_command(tmp_path):
    one = asked(type(TEXT), 2)
    record = Record.create(tmp_path / "refused", one.config())
    (file,) = (checkpoint_of(task, record).path for task in planned(one, record).tasks[:1])
    file.parent.mkdir()
    file.write_bytes(b"spoiled")
    with pytest.raises(LabError, match=r"cannot be read .* delete it"):
        work.work(one, one.load(), record, standard_console())
    with pytest.raises(Exception, match="a fault of the lab"):
        filled(asked(Failing, 2), tmp_path / "failed")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_all_processes_of_a_stopped_command_end_and_another_number_goes_on(tmp_path):
    """By Ctrl-C in the search, where it says how to go on, and by a kill in the final runs."""
    folder = tmp_path / "run"
    process = start("ptb", folder, "--nproc", "2")
    said = stop(process, folder / study.TRIALS, signal.SIGINT)
    assert process.returncode == 130
    assert "--resume --out" in said and "Traceback" not in said
    kept = kept_lines(folder)
    stop(start("ptb", folder, "--resume", "--nproc", "3"), folder / study.RUNS, signal.SIGKILL)
    assert kept <= kept_lines(folder)
    kept = kept_lines(folder)
    process = start("ptb", folder, "--resume")
    _, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    assert kept <= kept_lines(folder)
    assert not (folder / "unfinished").exists()
    assert [x["nproc"] for x in Record(folder).lines("environment.jsonl")] == [2, 3, 1]


ALONE = {
    "clusters": ({"clusters": 4, "shortlist": 20}, {}, "has clusters"),
    "negatives": ({"loss": "sampled_softmax"}, {}, "draws negatives"),
    "batch normalisation": ({"activation": "batchnorm"}, {}, "normalises over all rows"),
    "dropout in an LSTM": ({"lstm": True}, {"recurrent_dropout": 0.1}, "draws dropout"),
    "streams of text": ({"lstm": True}, {"carried": True}, "carries the states of all streams"),
    "tied": ({"lstm": True, "tied": True}, {}, "reads words by the rows of its output layer"),
}


@pytest.mark.parametrize("case", ALONE)
def test_outputs_that_one_process_trains_alone_are_refused_by_name(case):
    given, setup, words = ALONE[case]
    output = Output(**{"loss": "taylor_softmax", **given})
    with pytest.raises(LabError, match=f"--nproc must be 1, got 2: {output} {words}"):
        asked(type(TEXT), 2, outputs=(output,), setup=replace(TEXT.setup, **setup))


def test_devices_that_processes_cannot_have_are_refused():
    for device, words in {
        "cuda:1": "--device must be cpu or cuda with --nproc 64, got cuda:1",
        "cuda": f"--nproc must be at most {torch.cuda.device_count()}, the number of GPUs, got 64",
    }.items():
        with pytest.raises(LabError, match=words):
            asked(type(TEXT), 64, setup=replace(TEXT.setup, device=device))
