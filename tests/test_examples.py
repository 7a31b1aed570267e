"""Every example runs, and prints what its reader expects."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.once("an example chooses its device itself")

FOLDER = Path(__file__).parent.parent / "examples"
# Runs programs one after the other in one process, with a line before each.
RUN = """
import runpy, sys
for call in sys.argv[1:]:
    print("==", call, flush=True)
    sys.argv = call.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Example:
    """prints: a pattern of the output. needs: modules without which it is skipped."""

    prints: str
    needs: tuple[str, ...] = ()


QUICK = {
    "digits.py": Example(r"CrossEntropyLoss +test error \d.*\nTaylorSoftmaxLoss", ("sklearn",)),
    "language_model.py": Example(r"epoch 3: test perplexity [12]\d\d\nafter “", ("sklearn",)),
    "recommender.py": Example(r"the ten best new items have it for [2-9]\d\.\d % of the users"),
    "cuda_graphs.py": Example(r"a step captured: .* ms, loss \d"),
    "rerank.py": Example(r"the sentence itself is the best of 10 for [2-9]\d % of them"),
}
WITH_FRAMEWORKS = {
    "hugging_face.py": Example(
        r"perplexity of a byte.*: \d[\s\S]*sampled: .The ", ("transformers",)
    ),
    "hugging_face.py --model llama": Example(r"sampled: .The ", ("transformers",)),
    "lightning_classifier.py": Example(r"6 epochs, resumed after 3: loss [0-3]\.", ("lightning",)),
    "accelerate_training.py": Example(r"epoch 2: loss [0-3]\.", ("accelerate",)),
}


def outputs(calls: list[str]) -> dict[str, str]:
    """What each program printed, from one process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *calls],
        cwd=FOLDER,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parts = re.split(r"^== (.*)$", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def lacks(example: Example) -> list[str]:
    return [name for name in example.needs if importlib.util.find_spec(name) is None]


def test_examples_of_the_library_alone():
    calls = [name for name, example in QUICK.items() if not lacks(example)]
    for name, output in outputs(calls).items():
        assert re.search(QUICK[name].prints, output), (name, output)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_FRAMEWORKS)
def test_examples_with_frameworks(name):
    example = WITH_FRAMEWORKS[name]
    for module in lacks(example):
        pytest.skip(f"needs {module}")
    (output,) = outputs([name]).values()
    assert re.search(example.prints, output), output


def test_the_table_names_every_example_and_says_what_it_needs():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(.*?)\]\(\1\)", table, re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in FOLDER.glob("*.py"))
    mine = {call.split()[0] for call in (*QUICK, *WITH_FRAMEWORKS)}
    assert mine <= set(listed)
