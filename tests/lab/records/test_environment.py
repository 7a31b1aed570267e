"""Where the numbers of a record come from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from softsphere_lab.records import environment
from softsphere_lab.timing.benchmark import host


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


def test_a_changed_source_is_dirty_and_a_changed_record_is_not(monkeypatch, tmp_path):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    source, record = tmp_path / "src" / "environment.py", tmp_path / "records" / "r" / "config.json"
    for path in (source, record):
        path.parent.mkdir(parents=True)
        path.write_text("old")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(environment, "__file__", str(source))
    commit = environment.environment()["commit"]
    assert commit.isalnum() and len(commit) == 12
    record.write_text("new")
    assert environment.environment()["commit"] == commit
    source.write_text("new")
    assert environment.environment()["commit"] == f"{commit}-dirty"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    """Benchmarks run without what the data sets need."""
    real = environment.importlib.metadata.version

    def version(name):
        if name == "datasets":
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    found = environment.environment()["packages"]
    assert found["datasets"] is None and found["torch"] == real("torch")


def test_a_gpu_is_named_where_it_computes(monkeypatch):
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment.torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    assert environment.environment()["cuda"] is None
    assert environment.environment(device="cuda:1")["cuda"] == "GPU cuda:1"
    assert host("cuda")["machine"] == "GPU cuda"
    assert host()["machine"].startswith(f"{os.cpu_count()}-core")


def test_the_software_of_a_gpu_is_told_where_it_computes(monkeypatch):
    monkeypatch.setattr(environment.torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(environment.torch.version, "cuda", "13.0")
    real, asked = subprocess.run, []

    def answers(command, **how):
        if command[0] != "nvidia-smi":
            return real(command, **how)
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, b"580.65.06\n580.65.06\n", b"")

    monkeypatch.setattr(environment.subprocess, "run", answers)
    on_cpu = environment.environment()
    assert on_cpu["cuda_toolkit"] is on_cpu["cuda_driver"] is None and not asked
    found = environment.environment(device="cuda")
    assert found["cuda_toolkit"] == "13.0" and found["cuda_driver"] == "580.65.06"
    assert "triton" in found["packages"]

    def absent(command, **how):
        if command[0] != "nvidia-smi":
            return real(command, **how)
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(environment.subprocess, "run", absent)
    assert environment.environment(device="cuda")["cuda_driver"] is None
