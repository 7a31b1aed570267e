"""A layer over several ranks is that of one process, or is refused on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

import _sharded_clustered
import _sharded_dtensors
import _sharded_factored
import _sharded_linear
import _wrapped_layers
from _ranks import AVAILABLE, TIGHT, run
from softsphere import LinearSphericalLoss

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
SLOW = pytest.mark.slow
# All cases run in one process group of each size.
SIZES = [3, *(pytest.param(size, marks=SLOW) for size in (1, 2, 4))]
LAYERS = {
    "linear": _sharded_linear,
    "linear of DTensors": _sharded_dtensors,
    "factored": _sharded_factored,
    "clustered": _sharded_clustered,
    "wrapped": _wrapped_layers,
}


def of_all(kind):
    each = {layer: getattr(cases, kind) for layer, cases in LAYERS.items()}
    long = ", long" if kind == "LONG" else ""
    return {
        f"{layer}: {name}{long}": x for layer, cases in each.items() for name, x in cases.items()
    }


RIGHT, LONG, REFUSED = of_all("RIGHT"), of_all("LONG"), of_all("REFUSED")


@pytest.fixture(scope="module", params=SIZES)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    cases = dict(RIGHT)
    if request.param > 1:  # one rank cannot differ from others
        cases |= REFUSED
    if request.param != 3:
        cases |= LONG
    return run(cases, request.param, folder), folder


def check(results, name):
    for rank, found in enumerate(results[0]):
        assert found.get(name, "not run") is None, f"rank {rank}: {found.get(name)}"


@pytest.mark.parametrize("name", RIGHT)
def test_it_is_that_of_one_process(results, name):
    check(results, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_it_is_that_of_one_process_after_many_steps(results, name):
    if len(results[0]) == 3:
        pytest.skip("many steps are taken by other numbers of ranks")
    check(results, name)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_on_every_rank(results, name):
    if len(results[0]) == 1:
        pytest.skip("one rank cannot differ from others")
    check(results, name)


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # so one process loads
def test_a_checkpoint_of_ranks_loads_in_one_process(results):
    torch.manual_seed(2)
    given = {"prior": torch.arange(1.0, 24), "weight": torch.linspace(0.5, 2, 23)}
    one = LinearSphericalLoss(_sharded_linear.d, 23, **given, dtype=torch.float64)
    state = {name: torch.zeros_like(x) for name, x in one.state_dict().items()}
    dcp.load(state, checkpoint_id=results[1] / "checkpoint")
    for name, x in one.state_dict().items():
        assert torch.equal(state[name], x), name


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # so one process loads
@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_a_checkpoint_of_clusters_loads_in_one_process(results, engine):
    path = results[1] / f"clustered-{engine}"
    want = torch.load(f"{path}.pt")
    state = {"head": {name: torch.zeros_like(x) for name, x in want.items()}}
    dcp.load(state, checkpoint_id=path)
    for name, x in want.items():
        torch.testing.assert_close(state["head"][name], x, **TIGHT)
