"""The example of many processes: it trains under torchrun, is stopped, and goes on elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from _ranks import AVAILABLE

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--classes", "41", "--width", "8", "--rows", "24", "--context", "2"]
SMALL += ["--rate", "0.05", "--print", "1"]
pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs gloo"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # checkpoints of torch 2.6
    pytest.mark.once("the example chooses its device by itself"),
]


@pytest.fixture
def example(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # as the processes that are started here: NCCL needs a store of its own
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    yield importlib.import_module("many_processes")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def losses(said: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", said)}


def test_two_processes_are_stopped_and_one_goes_on(tmp_path, example, capsys):
    out = tmp_path / "run"
    given = [*SMALL, "--every", "3", "--out", str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(EXAMPLES / "many_processes.py"), *given, "--steps", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (
        open(tmp_path / "said", "w+") as wrong,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=wrong,
            text=True,
            env=environment,
            start_new_session=True,
        ) as started,
    ):
        said = ""
        for line in started.stdout:
            said += line
            if "step 5:" in line:
                # as a terminal does: to torchrun and to both processes
                os.killpg(started.pid, signal.SIGINT)
        code = started.wait()
        wrong.seek(0)
        assert "step 5:" in said, said + wrong.read()
    assert code != 0
    assert "41 classes, processes: 2, from step 0" in said
    last = int(re.search(r"Stopped after step (\d+); --resume goes on from step \1\.", said)[1])
    whole = [path.name for path in sorted(out.iterdir())]
    assert whole == sorted({f"step-{i:08d}" for i in (*range(3, last, 3), last)})
    # one process goes on from step 3, and sees the losses that two saw
    for name in whole[1:]:
        shutil.rmtree(out / name)
    assert example.main([*given, "--steps", str(last), "--resume"]) == 0
    alone = capsys.readouterr().out
    assert "41 classes, processes: 1, from step 3" in alone
    want, got = losses(said), losses(alone)
    assert sorted(got) == list(range(4, last + 1))
    for step, loss in got.items():
        assert float(loss) == pytest.approx(float(want[step]), rel=1e-4)


def test_a_run_that_cannot_go_on_says_why(tmp_path, example, capsys):
    given = [*SMALL, "--steps", "1", "--out", str(tmp_path / "run")]

    def refused(*arguments):
        assert example.main([*given, *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("many_processes.py: error: ") and len(said.splitlines()) == 1
        return said

    assert "run has no checkpoint; leave --resume out" in refused("--resume")
    assert not (tmp_path / "run").exists()
    assert example.main(given) == 0
    assert "was made with width 8, got 9" in refused("--width", "9", "--resume")
    assert "has checkpoints; pass --resume" in refused()
    assert example.main([*given, "--resume"]) == 0
    assert "Nothing is left to do" in capsys.readouterr().out
    (tmp_path / "run" / "step-00000009").mkdir()
    assert "step-00000009 is not a checkpoint of this program" in refused("--resume")
    (tmp_path / "run" / "step-00000009").rmdir()
    for path in (tmp_path / "run" / "step-00000001").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    assert "step-00000001 cannot be read; remove it" in refused("--resume", "--steps", "2")


# What is said of arguments. FILE is an empty file, and FOLDER an empty folder.
WRONG = {
    "--data FOLDER": "--data",
    "--data FILE": "--data",
    "--context 20000": "--context 20000 must be less than the 20000 words",
    "--rate 0": "--rate must be positive",
    "--rate -1": "--rate must be positive",
    "--rate nan": "--rate must be positive",
    "--rate inf": "--rate must be positive",
    "--seed -1": "--seed must be at least 0",
    "--seed 99999999999": "--seed must be at least 0 and less than 2**31",
    "--out FILE": "cannot be made",
    "--out FILE/run": "cannot be made",
    "--resume": "--resume needs --out",
}
MISREAD = {
    "--data FOLDER --classes 9": "--classes has no meaning with --data",
    "--out=": "argument --out: must name a folder",
    "--data=": "argument --data: must name a folder",
    "--rate much": "argument --rate: invalid float value",
    "--steps 0": "argument --steps: must be a whole number",
    "--classes -5": "argument --classes: must be a whole number",
    "--rows 1.5": "argument --rows: must be a whole number",
    "--timeout 99999999999999999999": "argument --timeout: must be a whole number",
    "--epochs 3": "unrecognized arguments",
}


def test_wrong_arguments_are_one_sentence_before_a_model_is_made(
    tmp_path, example, capsys, monkeypatch
):
    monkeypatch.setattr(example, "Model", None)
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("FOLDER").mkdir()
    for text, word in (WRONG | MISREAD).items():
        arguments = text.split()
        if text in WRONG:
            assert example.main(arguments) == 2, text
        else:
            with pytest.raises(SystemExit, match="2"):
                example.main(arguments)
        said = capsys.readouterr().err
        last = said.splitlines()[-1]
        assert "many_processes.py: error: " in said and word in last, (text, said)
        assert text in MISREAD or said == last + "\n"


@pytest.mark.slow
def test_one_of_several_processes_tells_what_is_wrong():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(EXAMPLES / "many_processes.py"), "--rate", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = re.findall(r"^many_processes.py: error: .*", done.stderr, re.MULTILINE)
    assert told == ["many_processes.py: error: --rate must be positive and less than 1e6, got 0.0"]


def test_full_sizes_are_for_what_is_not_given(example):
    options = example.parsed(["--full", "--width", "8"])
    assert (options.classes, options.width) == (example.FULL["classes"], 8)
    assert vars(example.parsed([])).items() >= example.QUICK.items()
