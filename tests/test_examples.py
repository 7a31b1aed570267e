"""Every example runs, and prints what its reader expects."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.once("an example chooses its device itself")

FOLDER = Path(__file__).parent.parent / "examples"
# Runs programs one after the other in one process, with a line before each. While one runs, nothing
# can be imported that its reader was not told to install.
RUN = """
import json, runpy, sys
for call, hidden in json.loads(sys.argv[1]):
    print("==", call, flush=True)
    sys.argv = call.split()
    kept = {name: sys.modules.get(name) for name in hidden}
    sys.modules.update(dict.fromkeys(hidden))
    runpy.run_path(sys.argv[0], run_name="__main__")
    for name, module in kept.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
"""
# What the last column of the table names, and the modules that come with it.
NEEDS = {
    "": (),
    "`scikit-learn`": ("sklearn", "scipy", "threadpoolctl"),
    "`transformers`, `accelerate`": ("transformers", "accelerate", "safetensors"),
    "`lightning`": ("lightning",),
    "`accelerate`": ("accelerate", "safetensors"),
}
PROGRAMS = sorted(file.name for file in FOLDER.glob("*.py"))
OPTIONAL = {name for modules in NEEDS.values() for name in modules}


@dataclass(frozen=True)
class Example:
    """prints: a pattern of the output. needs: the last column of the table."""

    prints: str
    needs: str = ""


# Those with fewer needs come first, since what one imports stays in the process.
QUICK = {
    "recommender.py": Example(r"the ten best new items have it for [2-9]\d\.\d % of the users"),
    "cuda_graphs.py": Example(r"a step taken by CapturedStep: .* ms, loss \d"),
    "rerank.py": Example(r"the sentence itself is the best of 10 for [2-9]\d % of them"),
    "digits.py": Example(r"CrossEntropyLoss +test error \d.*\nTaylorSoftmaxLoss", "`scikit-learn`"),
    "language_model.py": Example(r"epoch 3: test perplexity [12]\d\d\nafter “", "`scikit-learn`"),
}
WITH_FRAMEWORKS = {
    "hugging_face.py": Example(
        r"perplexity of a byte.*: \d[\s\S]*sampled: .The ", "`transformers`, `accelerate`"
    ),
    "hugging_face.py --model llama": Example(r"sampled: .The ", "`transformers`, `accelerate`"),
    "lightning_classifier.py": Example(r"6 epochs, resumed after 3: loss [0-3]\.", "`lightning`"),
    "accelerate_training.py": Example(r"epoch 2: loss [0-3]\.", "`accelerate`"),
}


def outputs(examples: dict[str, Example]) -> dict[str, str]:
    """What each program printed, from one process."""
    calls = [(call, hidden_from(example)) for call, example in examples.items()]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(calls)],
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


def hidden_from(example: Example) -> list[str]:
    """The packages that an example must do without."""
    if "lightning" in example.needs:  # its torchmetrics imports whatever it finds installed
        return []
    return sorted(OPTIONAL - {*NEEDS[example.needs]})


def lacks(example: Example) -> list[str]:
    return [name for name in NEEDS[example.needs] if importlib.util.find_spec(name) is None]


def test_examples_of_the_library_alone():
    chosen = {call: example for call, example in QUICK.items() if not lacks(example)}
    printed = outputs(chosen)
    assert list(printed) == list(chosen)
    for call, output in printed.items():
        assert re.search(QUICK[call].prints, output), (call, output)


@pytest.mark.slow
@pytest.mark.parametrize("call", WITH_FRAMEWORKS)
def test_examples_with_frameworks(call):
    example = WITH_FRAMEWORKS[call]
    for module in lacks(example):
        pytest.skip(f"needs {module}")
    (output,) = outputs({call: example}).values()
    assert re.search(example.prints, output), output


def test_the_table_names_every_example_and_says_what_it_needs():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(.*?)\]\(\1\) \|.*\| (.*?) ?\|$", table, re.MULTILINE)
    assert sorted(name for name, _ in rows) == PROGRAMS
    told = {call.split()[0]: example.needs for call, example in (QUICK | WITH_FRAMEWORKS).items()}
    for name, needs in rows:
        if name not in told:  # it has a file of tests
            assert (Path(__file__).parent / "examples" / f"test_{name}").is_file(), name
        else:
            assert needs == told[name], name
            wanted = re.search(r"pip install ([^)]*)", words_of(name))
            packages = wanted[1].split() if wanted else []
            assert ", ".join(f"`{package}`" for package in packages) == needs, name


def words_of(name: str) -> str:
    return ast.get_docstring(ast.parse((FOLDER / name).read_text("utf-8")))


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_has_a_full_size_which_its_first_lines_name(name):
    assert re.search(rf"python examples/{name} --full +# \w", words_of(name))
    assert 'add_argument("--full"' in (FOLDER / name).read_text("utf-8")


@pytest.mark.parametrize("name", PROGRAMS)
def test_ctrl_c_is_a_sentence_even_while_packages_are_imported(name, monkeypatch):
    real, before = builtins.__import__, signal.getsignal(signal.SIGINT)

    def imported(module, importer=None, *others):
        theirs = importer is not None and importer.get("__name__") == "__main__"
        if theirs and module.partition(".")[0] not in sys.stdlib_module_names:
            signal.raise_signal(signal.SIGINT)
        return real(module, importer, *others)

    monkeypatch.setattr(builtins, "__import__", imported)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(stopped.value, SystemExit)
    assert stopped.value.code == "Stopped by Ctrl-C."


def test_every_program_has_a_name_of_its_own():
    """Tests import programs by their names, which would find another one of the same name."""
    folders = ("benchmarks", "examples", "website")
    names = [path.stem for folder in folders for path in (FOLDER.parent / folder).glob("*.py")]
    assert sorted(names) == sorted(set(names))
