"""The hosted checks have no more rights than they need, and test what the project names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the groups frameworks and docs")

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / ".github" / "workflows" / "checks.yml").read_text("utf-8")
JOBS = yaml.safe_load(TEXT)["jobs"]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


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


def test_lint_runs_what_make_test_runs():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    checks = [line for line in commands("lint") if "pip install" not in line]
    assert checks
    for check in checks:
        assert f"\t$(BIN)/{check}\n" in makefile


def test_every_group_and_extra_that_a_job_installs_exists():
    for job in JOBS:
        for command in commands(job):
            for group in re.findall(r"--group (\S+)", command):
                assert re.search(rf"^{group} = \[", PROJECT, re.MULTILINE)
            for file in re.findall(r"--constraint (constraints\S*)", command):
                assert (ROOT / file).is_file()
