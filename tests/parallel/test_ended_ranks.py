"""A rank that is killed is an error on all others, and training goes on with one rank fewer."""

from __future__ import annotations

import json

import pytest
from torch import multiprocessing

import _ended_ranks
from _ranks import AVAILABLE

pytestmark = [pytest.mark.skipif(not AVAILABLE, reason="needs gloo"), pytest.mark.slow]


def test_the_others_end_with_an_error_and_resume(tmp_path):
    context = multiprocessing.spawn(
        _ended_ranks.until_one_is_ended, (3, str(tmp_path)), nprocs=3, join=False
    )
    for process in context.processes:
        process.join(120)
    assert [process.exitcode for process in context.processes] == [0, 0, -9]
    for rank in range(2):
        told = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert list(told) == ["factored"]
        assert "Another rank has ended" in told["factored"]
    multiprocessing.spawn(_ended_ranks.resumed, (2, str(tmp_path)), nprocs=2)
