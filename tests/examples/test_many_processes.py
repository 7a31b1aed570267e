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
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = importlib.import_module("many_processes")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


def losses(said: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", said)}


def test_two_processes_are_stopped_and_one_goes_on(tmp_path, example, capsys):
    out = tmp_path / "run"
    given = [*SMALL, "--every", "3", "--out", str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(EXAMPLES / "many_processes.py"), *given, "--steps", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
    assert "41 classes on 2 processes, from step 0" in said
    last = int(re.search(r"Stopped after step (\d+); --resume goes on from step \1\.", said)[1])
    whole = [path.name for path in sorted(out.iterdir())]
    assert whole == sorted({f"step-{i:08d}" for i in (*range(3, last, 3), last)})
    # one process goes on from step 3, and sees the losses that two saw
    for name in whole[1:]:
        shutil.rmtree(out / name)
    assert example.main([*given, "--steps", str(last), "--resume"]) == 0
    alone = capsys.readouterr().out
    assert "41 classes on 1 processes, from step 3" in alone
    want, got = losses(said), losses(alone)
    assert sorted(got) == list(range(4, last + 1))
    for step, loss in got.items():
        assert float(loss) == pytest.approx(float(want[step]), rel=1e-4)


def test_a_run_that_cannot_go_on_says_why(tmp_path, example, capsys):
    given = [*SMALL, "--steps", "1", "--out", str(tmp_path / "run")]
    assert example.main([*given, "--resume"]) == 2
    assert "run has no checkpoint; leave --resume out" in capsys.readouterr().err
    assert example.main(given) == 0
    assert example.main([*given, "--width", "9", "--resume"]) == 2
    assert "was made with width 8, got 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.main(given)
    assert "has checkpoints; pass --resume" in capsys.readouterr().err
    assert example.main([*SMALL, "--data", str(tmp_path)]) == 2
    assert "many_processes.py: error: " in capsys.readouterr().err
