"""Where the numbers of a record come from."""

from __future__ import annotations

from pathlib import Path

from softsphere_lab.records import environment


def test_the_environment_tells_how_memory_is_kept(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert environment.environment()["malloc"]["MALLOC_MMAP_MAX_"] == "0"


def test_the_environment_tells_whether_steps_are_captured(monkeypatch):
    monkeypatch.delenv(environment.EAGER, raising=False)
    assert not environment.environment()["eager"]
    monkeypatch.setenv(environment.EAGER, "1")
    assert environment.environment()["eager"]


def test_the_environment_tells_the_commit_of_a_checkout(monkeypatch, tmp_path):
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        assert environment.environment()["commit"].removesuffix("-dirty").isalnum()
    # a copy elsewhere, as pip makes one, is of no commit
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.environment()["commit"] is None
