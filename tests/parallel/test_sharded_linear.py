"""A LinearSphericalLoss over several ranks is that of one process, or is refused on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

import _sharded_linear as cases
from _ranks import AVAILABLE, run
from softsphere import LinearSphericalLoss

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
SLOW = pytest.mark.slow
SIZES = [3, *(pytest.param(size, marks=SLOW) for size in (1, 2, 4))]


@pytest.fixture(scope="module", params=SIZES)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # one rank cannot differ from others
    refused = cases.REFUSED if request.param > 1 else {}
    return run({**cases.RIGHT, **refused}, request.param, folder), folder


@pytest.mark.parametrize("name", cases.RIGHT)
def test_it_is_that_of_one_process(results, name):
    for rank, found in enumerate(results[0]):
        assert found.get(name, "not run") is None, f"rank {rank}: {found.get(name)}"


@pytest.mark.parametrize("name", cases.REFUSED)
def test_it_is_refused_on_every_rank(results, name):
    for rank, found in enumerate(results[0] if len(results[0]) > 1 else []):
        assert found.get(name, "not run") is None, f"rank {rank}: {found.get(name)}"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_ranks_loads_in_one_process(results):
    torch.manual_seed(2)
    given = {"prior": torch.arange(1.0, 24), "weight": torch.linspace(0.5, 2, 23)}
    one = LinearSphericalLoss(cases.d, 23, **given, dtype=torch.float64)
    state = {name: torch.zeros_like(x) for name, x in one.state_dict().items()}
    dcp.load(state, checkpoint_id=results[1] / "checkpoint", no_dist=True)
    for name, x in one.state_dict().items():
        assert torch.equal(state[name], x), name
