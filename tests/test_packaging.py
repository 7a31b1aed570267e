"""What is built from the source: the wheel, the sdist, and what an installed wheel can do."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import softsphere
from _environments import lacking, needed, python_with
from softsphere_lab import __main__ as lab

ROOT = Path(__file__).parents[1]
COMPARE = ["compare", "--epochs", "1", "--seeds", "1", "--losses", "softmax"]


def program(page: str, word: str) -> str:
    """The first program of a page that has a word."""
    programs = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    return next(text for text in programs if word in text)


# What a user can do with an extra, in an environment that has it alone.
USES = {
    "": ["-c", program("README.md", "TaylorSoftmaxLoss")],
    "clusters": [
        "-c",
        "import torch; from softsphere import clusters; counts = torch.arange(300, 0, -1); "
        "vectors = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)); "
        "clusters.by_vectors(vectors, counts)",
    ],
    "lab": ["-m", "softsphere_lab", *COMPARE],
    "transformers": ["-c", program("docs/frameworks.md", "replace_lm_head(model")],
    "skorch": ["-c", program("docs/frameworks.md", "SphericalClassifier(")],
}


def build(source: Path, folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of a source tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("Hatchling is not installed; the group dev of pyproject.toml has it")
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    with zipfile.ZipFile(built[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def names_in_wheel(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def names_in_sdist(sdist: Path) -> dict[str, int]:
    """The files of an sdist without its folder, with their sizes."""
    with tarfile.open(sdist) as archive:
        return {each.name.partition("/")[2]: each.size for each in archive if each.isfile()}


def test_the_version_stands_in_the_source_alone(metadata):
    assert metadata["Version"] == softsphere.__version__
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {softsphere.__version__}\n" in cited


def test_the_wheel_has_every_module_of_both_packages_and_nothing_else(built):
    names = {name for name in names_in_wheel(built[0]) if ".dist-info/" not in name}
    source = ROOT / "src"
    modules = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    assert names == modules | {"softsphere/py.typed"}


def test_the_library_needs_torch_alone_and_each_extra_is_tried(metadata):
    assert list(needed(metadata.get_all("Requires-Dist"))) == ["torch"]
    assert set(USES) - {""} == set(metadata.get_all("Provides-Extra"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]


def test_the_command_looks_for_what_the_extra_lab_installs(metadata):
    names = set(needed(metadata.get_all("Requires-Dist"), frozenset({"lab", "clusters"})))
    # threadpoolctl comes with scikit-learn
    asked = names - {"torch", "softsphere", "threadpoolctl"}
    # what sets are read with is looked for where it is used
    assert asked == {*lab.LAB.values(), "datasets", "pyarrow", "pillow"}


def test_the_sdist_has_the_tests_and_the_records_without_their_pictures(built):
    names = names_in_sdist(built[1])
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/_oracle.py", "mkdocs.yml"} <= set(
        names
    )
    assert any(re.fullmatch(r"records/.*/metrics\.jsonl", name) for name in names)
    assert not [name for name in names if name.startswith("records/") and name.endswith(".png")]
    assert max(names.values()) < 300_000 and sum(names.values()) < 10_000_000


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    again, _ = build(next(tmp_path.iterdir()), tmp_path / "dist")
    assert names_in_wheel(again) == names_in_wheel(built[0])


@pytest.mark.slow
@pytest.mark.parametrize("extra", USES)
def test_an_installed_wheel_works_with_torch_and_one_extra_alone(extra, built, metadata, tmp_path):
    names = set(needed(metadata.get_all("Requires-Dist"), frozenset({extra}))) - {"softsphere"}
    if extra == "lab":
        names |= set(needed(metadata.get_all("Requires-Dist"), frozenset({"clusters"})))
    if missing := lacking(names):
        pytest.skip(f"{missing} is not installed")
    python = python_with(tmp_path / "environment", names)
    wheel = f"{built[0]}[{extra}]" if extra else str(built[0])
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    pip += ["--no-index", "--no-compile", wheel]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        command = (str(python), *command)
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)

    where = run("-c", "import softsphere; print(softsphere.__file__, softsphere.__version__)")
    assert str(tmp_path) in where.stdout and softsphere.__version__ in where.stdout, where.stderr
    used = run(*USES[extra])
    assert used.returncode == 0, used.stderr
    command = run("-m", "softsphere_lab", "--version")
    if extra == "lab":
        assert command.stdout == f"softsphere {softsphere.__version__}\n"
    else:
        assert command.returncode == 2
        assert re.search("needs matplotlib, .*; pip install matplotlib .*", command.stderr)
        assert len(command.stderr.splitlines()) == 1


@pytest.mark.slow
def test_pyright_finds_the_types_of_the_public_names(tmp_path):
    """mypy reads the same file in `make test`."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("Pyright is not installed; the group dev of pyproject.toml has it")
    pyright = [sys.executable, "-m", "pyright"]
    if subprocess.run([*pyright, "--version"], capture_output=True).returncode:
        pytest.skip("Pyright cannot be started: at first it loads what it needs from a network")
    shutil.copy(ROOT / "tests" / "_typed_program.py", tmp_path / "program.py")
    settings = {"extraPaths": [str(ROOT / "src")], "typeCheckingMode": "strict"}
    settings["reportUnnecessaryTypeIgnoreComment"] = "error"
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    command = [*pyright, "-p", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_text_has_it_installed_by_its_name():
    """Nothing has been released, and an index may have another package of that name."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").iterdir()]
    texts = [*pages, *(ROOT / "src").rglob("*.py")]
    wrong = [str(x) for x in texts if re.search(r"install '?softsphere", x.read_text("utf-8"))]
    assert len(texts) > 300 and not wrong
