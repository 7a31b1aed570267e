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


def test_ranks_that_wait_for_others_in_vain_end_within_the_timeout(tmp_path):
    """One that takes another group for the layer does not keep the others waiting."""
    multiprocessing.spawn(_ended_ranks.of_another_group, (3, str(tmp_path)), nprocs=3)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(3)]
    assert told[2] is None  # its own group is whole
    for rank in range(2):
        assert "did not come to the same step within the timeout" in told[rank]


def test_ranks_of_jobs_of_different_sizes_do_not_train(tmp_path):
    multiprocessing.spawn(_ended_ranks.of_another_size, (2, str(tmp_path)), nprocs=2)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert all(told), told
