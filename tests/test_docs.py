"""Pages that are made from tables say what the tables say; their examples run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from _ranks import AVAILABLE, start

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = [
    # Importing transformers takes longer than all other examples; `make docs` runs that one too.
    pytest.param(
        code,
        id=f"{page.stem}-{i}",
        marks=[pytest.mark.slow] if "import AutoModel" in code else [],
    )
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # checkpoints of torch 2.6
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # of torch 2.6
@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code):
    for name in ("skorch", "transformers"):
        if f"softsphere.integrations.{name}" in code:
            pytest.importorskip(name, reason=f"{name} is not installed")
    if "fully_shard" in code and not hasattr(torch.cpu.Stream(), "record_event"):
        pytest.skip("fully_shard needs streams, which this PyTorch has on GPUs alone")
    try:
        exec(code, {})
    finally:
        if dist.is_available() and dist.is_initialized():  # by an example that failed
            dist.destroy_process_group()


def run_on_a_rank(rank, folder, codes):
    """Runs examples whose comment says what to do under torchrun, as it says."""
    for i, code in enumerate(codes):
        torch.manual_seed(rank)  # no example may need luck to have the same numbers on all ranks
        store = f'init_method="file://{folder}/{i}", rank={rank}, world_size=2'
        exec(code.replace("store=dist.HashStore(), rank=0, world_size=1", store), {})


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
def test_the_examples_of_many_processes_run_on_two(tmp_path):
    page = (ROOT / "docs" / "many_processes.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert all(code.count("store=dist.HashStore(), rank=0, world_size=1") == 1 for code in codes)
    if not hasattr(torch.cpu.Stream(), "record_event"):
        codes = [code for code in codes if "fully_shard" not in code]
    start(run_on_a_rank, (str(tmp_path), codes), 2)


def test_the_page_of_costs_is_that_of_the_measured_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    costs = importlib.import_module("costs_page")
    assert costs.PAGE.read_text() == costs.page()


def test_the_page_of_engines_is_that_of_the_measured_grid(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    engines = importlib.import_module("engines_page")
    assert engines.PAGE.read_text() == engines.page(engines.read_table(engines.TABLE))


def test_the_page_of_many_processes_is_that_of_the_formulas(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scaling = importlib.import_module("scaling_simulated")
    text = scaling.PAGE.read_text()
    assert scaling.page(text) == text
