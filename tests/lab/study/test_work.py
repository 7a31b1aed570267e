"""What a record lacks is done, in one process or in several, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from _lab_studies import IMAGES, TEXT, untimed
from softsphere_lab.errors import LabError
from softsphere_lab.models.output_layers import Output
from softsphere_lab.progress import standard_console
from softsphere_lab.records.folder import Record
from softsphere_lab.study import protocol as study
from softsphere_lab.study import work


def test_a_finished_run_leaves_no_state(tmp_path):
    record = Record.create(tmp_path / "r", IMAGES.config())
    work.work(IMAGES, IMAGES.load(), record, standard_console())
    assert {path.name for path in record.folder.iterdir()} == {
        "config.json",
        "environment.jsonl",
        study.TRIALS,
        study.RUNS,
    }


def test_every_process_has_what_is_made_from_the_data(tmp_path):
    output = Output("taylor_softmax", clusters=4, shortlist=20)
    asked = replace(TEXT, outputs=(output,), setup=replace(TEXT.setup, epochs=1))
    record = Record.create(tmp_path / "r", asked.config())
    work.work(asked, asked.load(), record, standard_console(), jobs=2)
    assert len(ends := [line for line in record.lines(study.RUNS) if "final" in line]) == 2
    assert not any(line["final"]["diverged"] for line in ends)
    assert [path.name for path in (record.folder / "clusters").iterdir()] == [
        "meaning-4-shortlist-20.pt"
    ]


def lines(folder: Path) -> list:
    return [
        json.dumps(untimed(json.loads(line)))
        for name in (study.TRIALS, study.RUNS)
        for line in (folder / name).read_text().splitlines()
    ]


def start(folder: Path, *more: str, name: str = "ptb") -> subprocess.Popen:
    command = ["reproduce", name, "--budget", "smoke", "--out", str(folder), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "softsphere_lab", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # sums of several threads differ in the last digit from those of one
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def workers(pid: int) -> list[int]:
    """The processes that one has begun, and theirs."""
    found = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in workers(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(processes: list[int]) -> bool:
    """Whether all end soon: one that has closed its pipes is seen for some moments yet."""
    end = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, processes))


def test_a_process_of_a_job_that_finds_no_data_says_so(tmp_path):
    gone = replace(TEXT, dataset="ptb", data_dir=tmp_path / "nowhere")
    record = Record.create(tmp_path / "r", TEXT.config())
    with pytest.raises(LabError, match="nowhere"):
        work.work(gone, TEXT.load(), record, standard_console(), jobs=2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        ("mnist", "1"),
        pytest.param("ptb", "1", marks=pytest.mark.slow),
        pytest.param("ptb", "2", marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_nothing_is_lost_and_nothing_goes_on_alone(name, jobs, tmp_path):
    if int(jobs) > (os.cpu_count() or 1):
        pytest.skip("as many jobs as cores")
    folder = tmp_path / "run"
    kept, more = [], []
    for moment in (1, 3):
        process = start(folder, "--jobs", jobs, *more, name=name)
        # a later moment each time: in the search, in the final runs
        end = time.monotonic() + 100
        wanted = study.TRIALS if moment == 1 else study.RUNS
        while process.poll() is None and time.monotonic() < end:
            if (folder / wanted).exists() and len((folder / wanted).read_bytes()) > 10:
                break
            time.sleep(0.02)
        begun = workers(process.pid)
        process.kill()
        # whose pipes are open as long as a process of its own is there
        process.communicate(timeout=60)
        assert all_end(begun)
        now = [line for name in (study.TRIALS, study.RUNS) if (folder / name).exists()
               for line in (folder / name).read_text().splitlines()]  # fmt: skip
        assert set(kept) <= set(now)
        kept, more = now, ["--resume"]
    process = start(folder, "--jobs", jobs, "--resume", name=name)
    _, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    assert set(kept) <= {
        line
        for name in (study.TRIALS, study.RUNS)
        for line in (folder / name).read_text().splitlines()
    }
    assert not (folder / "unfinished").exists()
    whole = tmp_path / "whole"
    process = start(whole, name=name)
    process.communicate(timeout=120)
    assert sorted(lines(folder)) == sorted(lines(whole))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_ends_every_process_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path / "run", "--jobs", "2" if (os.cpu_count() or 1) > 1 else "1")
    end = time.monotonic() + 100
    while not (tmp_path / "run" / study.TRIALS).exists() and time.monotonic() < end:
        time.sleep(0.02)
    begun = workers(process.pid)
    # the terminal tells all of its processes
    os.killpg(process.pid, signal.SIGINT)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume --out" in said and "Traceback" not in wrong + said
    assert all_end(begun)
