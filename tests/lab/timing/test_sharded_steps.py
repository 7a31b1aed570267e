"""The formulas of sharded layers are what the layers send, keep and compute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from _engines import OPERATORS, flops_of_calls
from _ranks import AVAILABLE
from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
)
from softsphere.matrix import step as factored_step
from softsphere.optim import FactoredSGD
from softsphere.parallel import count_traffic
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.collectives import ALGORITHMS, MODELS, Network, seconds, sent
from softsphere_lab.timing.over_ranks import measured_on_ranks, vocabulary_parallel_softmax
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.sharded_steps import (
    CLUSTERED,
    FACTORED,
    GRAM,
    SHARDED,
    SOFTMAX,
    Machine,
    number_of_clusters,
    scales_to,
    simulated,
)

PAGE = Path(__file__).parents[3] / "docs" / "many_processes.md"
SETTINGS = (Setting(D=1_001, d=8, m=20), Setting(D=50, d=16, m=4))
MACHINE = Machine(Network(latency=1e-5, bandwidth=1e10), flops=1e12)


@pytest.fixture
def four_ranks():
    """A group of four ranks, three of which only seem to be there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()


def made(layer, s, group=None, prior=False, bias=False):
    """A step of a layer, of which each call takes the rows of one rank."""
    given, counts = {"bias": bias, "process_group": group}, torch.arange(1.0, s.D + 1)
    if layer == CLUSTERED:
        given |= {"counts": counts if prior else None, "engine": "logits"}
        head = ClusteredLoss(s.d, s.D, torch.arange(s.D) % number_of_clusters(s), **given)
        optimizer = torch.optim.Adam(head.parameters())
        given = {}
    else:
        given |= {"prior": counts if prior else None}
    if layer == GRAM:
        options = LinearSphericalOptions(engine="gram")
        head = LinearSphericalLoss(s.d, s.D, options=options, **given)
        optimizer = torch.optim.Adam(head.parameters())
    elif layer == FACTORED:
        head = FactoredSphericalLoss(s.d, s.D, **given)
        optimizer = FactoredSGD(head.parameters(), lr=0.01)
    rows = s.m if group is None else s.m // 4

    def step():
        optimizer.zero_grad()
        target = torch.arange(rows) % s.D
        head(torch.randn(rows, s.d, requires_grad=True), target).backward()
        optimizer.step()

    return head, optimizer, step


@pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
@pytest.mark.parametrize("prior", [False, True], ids=["", "prior"])
@pytest.mark.parametrize("layer", [GRAM, FACTORED, CLUSTERED])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_step_sends_what_the_formulas_say(layer, setting, prior, four_ranks):
    step = made(layer, setting, four_ranks, prior)[2]
    with count_traffic() as first:
        step()
    with count_traffic() as traffic:
        step()
    of_gram = 8 * setting.d**2 + 12 * setting.d if layer == FACTORED else 0
    assert first.bytes == traffic.bytes + of_gram
    assert traffic.calls == SHARDED[layer].calls(setting, 4, *[True] * prior)


@pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
def test_a_bias_is_one_more_column_of_the_factored_layer_alone(four_ranks):
    s = SETTINGS[0]
    wider = Setting(s.D, s.d + 1, s.m)
    for layer, same in ((GRAM, s), (FACTORED, wider), (CLUSTERED, s)):
        step = made(layer, s, four_ranks, bias=True)[2]
        step()
        with count_traffic() as traffic:
            step()
        assert traffic.calls == SHARDED[layer].calls(same, 4)


@pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
def test_a_rank_keeps_what_the_formulas_say(four_ranks):
    s = SETTINGS[0]
    head, optimizer, step = made(GRAM, s, four_ranks)
    step()
    weight = head.weight
    assert weight.nbytes + weight.grad.nbytes == SHARDED[GRAM].kept(s, 4)
    state = sum(x.nbytes for x in optimizer.state[weight].values() if x.shape == weight.shape)
    assert state == 2 * SHARDED[GRAM].state(s, 4)
    arrays = made(FACTORED, s, four_ranks)[0].weight.matrix.arrays
    generations = arrays.generations
    matrices = (arrays.U, arrays.U_inv, arrays.centred_gram, generations.maps)
    kept = (*arrays.V.blocks, generations.made, *matrices)
    assert sum(x.nbytes for x in kept) == SHARDED[FACTORED].kept(s, 4)


@pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
def test_a_rank_keeps_its_clusters_and_where_each_class_belongs(four_ranks):
    s = Setting(D=64**2, d=8, m=20)
    head, optimizer, step = made(CLUSTERED, s, four_ranks)
    step()
    parameters = list(head.parameters())
    state = [x for p in parameters for x in optimizer.state[p].values() if x.shape == p.shape]
    assert sum(x.nbytes for x in state) == 2 * SHARDED[CLUSTERED].state(s, 4)
    clusters = head.clusters
    held = (
        *vars(clusters).values(),
        *vars(clusters.grouping).values(),
        *vars(clusters.own).values(),
    )
    arrays = [x for x in (*held, *head.buffers()) if isinstance(x, torch.Tensor)]
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in arrays}
    found = sum(memory.values()) + sum(p.nbytes + p.grad.nbytes for p in parameters)
    assert found == pytest.approx(SHARDED[CLUSTERED].kept(s, 4), rel=0.01)


def value(formula, names):
    """What a formula of the page is, in which numbers and letters side by side are multiplied."""
    replaced = (("⌈D/n⌉", "share"), ("⌈(S + C)/n⌉", "root"), ("²", "**2"), ("³", "**3"))
    for text, code in replaced:
        formula = formula.replace(text, code)
    return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula), names)


def cells(s):
    """The table of the page, and what its letters mean in a setting of four ranks."""
    table = re.findall(r"^\| (.*) \| (.*) \| (all-gather: .*) \| (.*) \|$", PAGE.read_text(), re.M)
    assert len(table) == len(SHARDED)
    C, share = number_of_clusters(s), -(-s.D // 4)
    names = {"n": 4, "M": s.m // 4, "D": s.D, "d": s.d, "m": s.m, "share": share, "L": share}
    # of the clusters: its rows of the root, and the sizes of the clusters of its rows
    names |= {"root": -(-C // 4), "P": s.m // 4 * -(-s.D // C)}
    return zip(table, SHARDED.values(), strict=True), names


@pytest.mark.parametrize("setting", [*SETTINGS, Setting(D=1_001, d=8, m=4)], ids=str)
def test_the_page_has_the_formulas(setting):
    rows, names = cells(setting)
    for (_, kept, sent_by_name, flops), layer in rows:
        said = dict(part.split(": ") for part in sent_by_name.split("; "))
        for name, formula in said.items():
            sizes = [x for kind, x in layer.calls(setting, 4) if kind == name.replace("-", "_")]
            assert sum(sizes) == value(formula, names)
        assert {name.replace("-", "_") for name in said} == {x for x, _ in layer.calls(setting, 4)}
        first, _, more = kept.partition(", and ")
        assert value(first, names) == layer.kept(setting, 4)
        if more:
            formula, _, what = more.partition(" for ")
            other = {"the logits": layer.at_work, "each array of the optimizer": layer.state}[what]
            assert value(formula, names) == other(setting, 4)
        few, _, many = flops.partition(" for m < d, otherwise ")
        formula = many if many and setting.m >= setting.d else few
        assert value(formula, names) == layer.flops(setting, 4)


@pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
@pytest.mark.parametrize("m", [16, 400])
def test_a_linear_step_computes_what_the_formula_says(m, four_ranks):
    s = Setting(D=1_000, d=64, m=m)
    step = made(GRAM, s, four_ranks)[2]
    with flops_of_calls([OPERATORS["gram"]], "forward", "backward") as found:
        step()
    assert sum(found) == pytest.approx(SHARDED[GRAM].flops(s, 4), rel=0.05)


@pytest.mark.parametrize("m", [16, 64, 200])
def test_a_factored_step_computes_what_the_formula_says(m, monkeypatch):
    # The formula leaves the inverse out, whose products test_inverse.py bounds.
    monkeypatch.setattr(factored_step, "by_few_products", lambda K, share: None)
    s = Setting(D=500, d=64, m=m)
    step = made(FACTORED, s)[2]
    step()
    with FlopCounterMode(display=False) as counted:
        step()
    assert counted.get_total_flops() == pytest.approx(SHARDED[FACTORED].flops(s, 1), rel=0.15)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # of torch 2.6
def test_vocabulary_parallel_softmax_has_the_collectives_of_loss_parallel(four_ranks):
    from torch.distributed.tensor.debug import CommDebugMode

    s = Setting(D=48, d=8, m=8)
    step = vocabulary_parallel_softmax(s)
    with CommDebugMode() as counted:
        step(torch.randn(2, 8, requires_grad=True), torch.arange(2))
    found = {str(op).split(".")[-1]: n for op, n in counted.get_comm_counts().items()}
    names = [name for name, _ in SHARDED[SOFTMAX].calls(s, 4)]
    assert found == {
        "all_gather_into_tensor": names.count("all_gather"),
        "all_reduce": names.count("all_reduce"),
        "reduce_scatter_tensor": names.count("reduce_scatter"),
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_ring_sends_the_fewest_bytes_and_a_tree_the_fewest_messages(name):
    fast, slow = Network(1.0, 1e30), Network(1e-30, 1.0)
    ring, tree, best = (seconds(name, 4096, 64, fast, way) for way in ALGORITHMS)
    assert tree == best < ring
    ring, tree, best = (seconds(name, 4096, 64, slow, way) for way in ALGORITHMS)
    assert ring == best <= tree
    assert ring == sent(name, 4096, 64)


def test_softmax_sends_as_much_and_computes_more():
    """At m = 3d rows in all, the logits take 6mDd = 18 D d² FLOPs, and the Gram matrix 4 D d²."""
    s = Setting(D=10**8, d=512, m=3 * 512)
    gram, softmax = (simulated(layer, s, 64, MACHINE) for layer in (GRAM, SOFTMAX))
    assert softmax.computing / gram.computing == pytest.approx(18 / 4, rel=0.01)
    assert SHARDED[SOFTMAX].sent(s, 64) == pytest.approx(SHARDED[GRAM].sent(s, 64), rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="needs gloo")
@pytest.mark.parametrize("layer", SHARDED)
def test_a_step_of_processes_is_timed_and_its_messages_are_counted(layer):
    s = Setting(D=101, d=8, m=16)
    found = measured_on_ranks(layer, s, Effort(warm_up=1, most=2), 2)
    assert 0 < found["seconds"] < 10
    calls = SHARDED[layer].calls(s, 2)
    counted = (len(calls), sum(size for _, size in calls)) if layer != SOFTMAX else (None, None)
    assert (found["messages"], found["bytes"]) == counted


def test_a_layer_scales_until_doubling_the_ranks_saves_too_little():
    s = Setting(D=10**8, d=256, m=65_536)
    limit = scales_to(GRAM, s, MACHINE, 4096)
    times = {n: simulated(GRAM, s, n, MACHINE).seconds for n in (limit // 2, limit, 2 * limit)}
    assert 1 < limit < 4096
    assert times[limit] <= 0.9 * times[limit // 2] and times[2 * limit] > 0.9 * times[limit]
    assert scales_to(GRAM, s, MACHINE, 4) == 4
    assert scales_to(FACTORED, s, MACHINE, 4096) == 1
