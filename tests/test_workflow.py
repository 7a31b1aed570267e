"""The hosted checks have no more rights than they need, and test what the project names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the group dev")

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / ".github" / "workflows" / "checks.yml").read_text("utf-8")
JOBS = yaml.safe_load(TEXT)["jobs"]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_actions_are_pinned_by_commit_with_their_version():
    used = re.findall(r"uses: (.*)", TEXT)
    assert used
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", x) for x in used)


def test_only_publishing_may_write_and_it_waits_for_every_check():
    assert yaml.safe_load(TEXT)["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert granted == {"publish": {"id-token": "write"}}
    assert set(JOBS["publish"]["needs"]) == set(JOBS) - {"publish"}
    assert "secrets." not in TEXT


def test_tested_versions_are_those_that_the_project_names():
    matrix = JOBS["test"]["strategy"]["matrix"]
    assert {each["python"] for each in matrix["include"]} == set(matrix["python"])
    for python in matrix["python"]:
        assert f'"Programming Language :: Python :: {python}"' in PROJECT
    torches = [
        re.search(r"^torch==(\S+)$", (ROOT / each["constraints"]).read_text("utf-8"), re.MULTILINE)[
            1
        ]
        for each in matrix["include"]
    ]
    least = re.search(r'"torch>=([\d.]+)"', PROJECT)[1]
    assert torches[0] == f"{least}.0" and len(set(torches)) == 3


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, without the folder of the environment."""
    workers = re.search(r"^WORKERS \?= (\d+)$", MAKEFILE, re.MULTILINE)[1]
    made = MAKEFILE.replace("$(WORKERS)", workers)
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", made, re.MULTILINE)[1].splitlines()
    return [re.sub(r"\$\((BIN|OLDEST)\)/", "", line.strip()) for line in lines]


def test_lint_and_tests_run_what_make_test_runs_and_nothing_else():
    checks = [line for line in commands("lint") if "pip install" not in line]
    *made, tests = recipe("test")
    assert len(made) == 4 and checks == made
    # the tests of the oldest torch have one option more, which is right for the others as well
    assert tests == "OMP_NUM_THREADS=1 pytest -n 2 --dist worksteal"
    assert recipe("test-oldest")[0].startswith(tests)
    oldest = recipe("test-oldest")[0].removeprefix("OMP_NUM_THREADS=1 ")
    assert commands("test")[-1] == f"python -m {oldest}"
    assert yaml.safe_load(TEXT)["env"]["OMP_NUM_THREADS"] == "1"


def test_each_job_runs_on_the_systems_that_the_guide_names():
    systems = {name: job["runs-on"] for name, job in JOBS.items()}
    assert {name for name, system in systems.items() if system != "ubuntu-latest"} == {"test"}
    assert JOBS["test"]["strategy"]["matrix"]["os"] == [
        "ubuntu-latest",
        "macos-latest",
        "windows-latest",
    ]
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    told = "runs the tests on Linux, macOS and Windows, and everything else on Linux"
    assert told in " ".join(guide.split())


def test_the_newest_torch_is_tested_with_the_frameworks_as_in_the_makefile():
    install = commands("test")[-2]
    assert install.endswith('--editable ".[lab]" --group dev ${{ matrix.frameworks }}')
    newest = [x for x in JOBS["test"]["strategy"]["matrix"]["include"] if "frameworks" in x]
    assert [(x["constraints"], x["frameworks"]) for x in newest] == [
        ("constraints.txt", "--group frameworks")
    ]
    assert "--group dev $(if $(filter .venv/%,$@),--group frameworks)" in MAKEFILE


def test_the_examples_that_need_a_framework_are_run():
    (slow,) = [line for line in commands("package") if "-m pytest" in line]
    assert '-m "slow or not slow"' in slow and "tests/test_examples.py" in slow
    assert any("--group frameworks" in line for line in commands("package"))


def test_every_group_and_extra_that_a_job_installs_exists():
    for job in JOBS:
        for command in commands(job):
            for group in re.findall(r"--group (\w+)", command):
                assert re.search(rf"^{group} = \[", PROJECT, re.MULTILINE)
            for file in re.findall(r"--constraint (constraints\S*)", command):
                assert (ROOT / file).is_file()
