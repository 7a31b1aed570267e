"""What a step of a clustered layer touches."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from softsphere import ClusteredLoss, _torch
from softsphere.engines import choose_leaves, grouped_products
from softsphere.engines.grouping import Group
from softsphere.functional import on_leaves
from softsphere.functional.on_leaves import Leaves
from softsphere.optim import FactoredSGD

d = 16


class Written(TorchDispatchMode):
    """The entries of all tensors that operations made, and how many operations there were.

    largest: the entries of the largest of them.
    """

    def __init__(self):
        super().__init__()
        self.entries = self.operations = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for x in result if isinstance(result, tuple) else (result,):
            # a view or a sparse tensor has no memory of its own
            if isinstance(x, torch.Tensor) and not x.is_sparse and not func.is_view:
                self.entries += 0 if func._schema.is_mutable else x.numel()
                self.largest = max(self.largest, x.numel())
        return result


def step(clusters: int, size: int, rest: int, leaf: str, **options) -> Written:
    """A step with targets in the first two clusters, beside one of `rest` classes without any."""
    assignment = torch.arange(clusters).repeat_interleave(size)
    assignment = torch.cat([assignment, torch.full((rest,), clusters)])
    head = ClusteredLoss(d, len(assignment), assignment, leaf=leaf, sparse=True, **options)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    hidden = torch.randn(12, d, requires_grad=True)
    target = torch.randint(2 * size, (12,), generator=torch.Generator().manual_seed(0))
    head(hidden, target)  # the first call checks the base measure of all classes
    with Written() as written:
        optimizer.zero_grad()
        head(hidden, target).backward()
        optimizer.step()
    return written


@pytest.mark.parametrize("many_rows", [0, 10**9], ids=["tiles", "pairs"])
@pytest.mark.parametrize("leaf", ["taylor_softmax", "softmax"])
def test_clusters_without_targets_cost_nothing(leaf, many_rows, monkeypatch):
    monkeypatch.setattr(grouped_products, "_MANY_ROWS", many_rows)
    few, many = (step(8, 20, rest, leaf, bias=False).entries for rest in (2, 50_000))
    assert few == many > 0
    few, many = (step(8, 20, rest, leaf).entries for rest in (2, 50_000))
    # the gradient of the bias, and nothing else
    assert many - few == 49_998


# The sizes of clusters and the rows of each, as pairs (how many clusters, of that many).
SHAPES = {
    "even": ([(40, 100)], [(40, 20)]),
    "nearly even": ([(20, 95), (20, 100)], [(20, 22), (20, 18)]),
    "the large ones have the rows": ([(1, 900), (9, 100), (90, 10)], [(1, 900), (9, 90), (90, 2)]),
    "the small ones have the rows": ([(90, 10), (9, 100), (1, 900)], [(90, 20), (9, 20), (1, 3)]),
    "a large one with few rows": ([(1, 50), (1, 20_000)], [(1, 500), (1, 5)]),
    "a small one with many rows": ([(1, 2), (19, 2000)], [(1, 5000), (19, 1)]),
    "a large one with many rows": ([(1, 1000), (50, 2)], [(1, 1000), (50, 1)]),
    "a large one beside those without rows": ([(1, 1000), (1500, 2)], [(1, 400), (1500, 0)]),
    "a large one among many": ([(1, 1000), (500, 2)], [(1, 1000), (500, 1)]),
    "a large one among very many": ([(1, 900), (2000, 2)], [(1, 400), (2000, 1)]),
}


def shaped(name, width, **options):
    """A layer, the hidden rows and the targets of a shape, and the rows of each cluster."""
    sizes, rows = (
        torch.tensor([of for many, of in shape for _ in range(many)]) for shape in SHAPES[name]
    )
    assignment = torch.arange(len(sizes)).repeat_interleave(sizes)
    target = (sizes.cumsum(0) - sizes).repeat_interleave(rows)
    head = ClusteredLoss(width, len(assignment), assignment, **options)
    return head, torch.randn(len(target), width, requires_grad=True), target, rows


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize(
    "options", [{"leaf": "softmax"}, {"engine": "logits", "sparse": True}, {"engine": "gram"}]
)
@pytest.mark.parametrize("name", SHAPES)
def test_no_tensor_is_much_larger_than_what_a_step_needs(name, options, width):
    """The rows, the leaves, and their pairs or a Gram matrix for each cluster with rows."""
    head, hidden, target, rows = shaped(name, width, **options)
    with Written() as written:
        head(hidden, target).backward()
    root, sizes = len(target) * len(rows), head.grouping.sizes
    needed = (len(target) + len(head.weight)) * width
    if head.engine == "gram":
        needed += int((rows > 0).sum()) * (width + 1) ** 2
    else:
        needed += int((sizes * rows).sum())
    assert written.largest <= max(root, 6 * needed)


@pytest.mark.parametrize(
    ("name", "gram"),
    {
        "a large one with many rows": True,
        "a large one beside those without rows": True,
        "a large one among very many": False,
    }.items(),
)
def test_auto_makes_gram_matrices_where_few_clusters_have_many_pairs(name, gram, monkeypatch):
    made = []
    statistics = on_leaves.cluster_statistics

    def noted(*given):
        made.append(True)
        return statistics(*given)

    monkeypatch.setattr(on_leaves, "cluster_statistics", noted)
    head, hidden, target, _ = shaped(name, 64)
    head(hidden, target)
    assert bool(made) == gram


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("size", [4, 20, 100, 300])
def test_auto_takes_the_engine_that_is_told_for_even_clusters(size, width):
    """Whatever the number of rows, as long as clusters have the same sizes and rows."""
    C = 6
    head = ClusteredLoss(width, C * size, torch.arange(C).repeat_interleave(size))
    loss = head.loss
    for each in (1, 2, 5, 10, 20, 40, 80, 160, 320):
        cluster = torch.arange(C).repeat_interleave(each)
        group = Group(cluster, cluster * size, head.grouping)
        leaves = Leaves(head.weight, head.bias, head.prior)
        taken = on_leaves._cheapest(loss, torch.empty(C * each, width), leaves, group, False)
        assert taken == choose_leaves(C * each, C * size, C, width).engine, each


@pytest.mark.parametrize("many_rows", [0, 10**9], ids=["tiles", "pairs"])
def test_there_is_no_loop_over_clusters(many_rows, monkeypatch):
    monkeypatch.setattr(grouped_products, "_MANY_ROWS", many_rows)
    few, many = (step(clusters, 3, 1, "softmax").operations for clusters in (2, 60))
    assert few == many


def test_gram_matrices_do_not_loop_over_clusters():
    def operations(clusters: int) -> int:
        assignment = torch.arange(clusters).repeat(5)
        head = ClusteredLoss(d, len(assignment), assignment, engine="gram")
        with Written() as written:
            head(torch.randn(40, d), torch.randint(len(assignment), (40,))).backward()
        return written.operations

    assert operations(2) == operations(60)


# Operations with results that a GPU has to be waited for, since they are numbers or have as many.
WAITING = ("_local_scalar_dense", "nonzero", "unique_consecutive", "_unique2", "masked_select")


class Waits(TorchDispatchMode):
    """Notes what a device of a type has to be waited for."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.found = device, []

    def note(self, name, x):
        if x.device.type == self.device:
            self.found.append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        waits = name in WAITING
        if name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        elif name.strip("_") in ("index", "index_put", "index_put_impl"):
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        elif name == "_to_copy":
            waits = str(kwargs.get("device")) == "cpu"
        if waits:
            self.note(name, args[0])
        return func(*args, **kwargs)


# In an uneven batch, where the leaves of most clusters are several blocks. A factored step has five
# for each of three sizes of clusters, and seven more.
MOST_WAITS = {"logits": 4, "gram": 4, "factored": 22}


@pytest.mark.parametrize("engine", MOST_WAITS)
def test_a_step_has_few_waits(engine, device, monkeypatch):
    """What is kept for the next step is computed without modes, so that it is not seen here."""
    if device == "cpu" and engine == "factored":
        pytest.skip("sizes of clusters are read from a copy on the CPU, which looks alike there")
    monkeypatch.setattr(_torch, "_disable_current_modes", nullcontext)
    waits, tolist = Waits(device), torch.Tensor.tolist

    def noted(x):
        if device == "cpu":  # elsewhere a copy on the CPU is read, which is seen
            waits.note("tolist", x)
        return tolist(x)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(64, (4000,), generator=generator).square() // 64
    head = ClusteredLoss(d, len(assignment), assignment, engine=engine, device=device)
    if engine == "factored":
        optimizer = FactoredSGD(head.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, foreach=False)
    hidden = torch.randn(512, d, requires_grad=True)
    target = torch.randint(len(assignment), (512,), generator=generator)
    for _ in range(3):  # the first step checks the base measure, and makes what is kept
        waits.found.clear()
        with waits:
            head(hidden, target).backward()
            optimizer.step()
        optimizer.zero_grad()
    assert len(waits.found) <= MOST_WAITS[engine], waits.found
    assert waits.found  # the shapes of a step do depend on its targets


def test_the_choice_turns_with_the_rows_of_a_cluster():
    engines = [choose_leaves(rows, 100_000, 100, 64).engine for rows in (100, 1_000_000)]
    assert engines == ["logits", "gram"]
    assert "engine='factored' costs least" in choose_leaves(100, 10_000_000, 100, 64).reason
    assert "factored'" not in choose_leaves(100, 1_000, 100, 64).reason
    with pytest.raises(ValueError, match="rows must be at least 0, got -1"):
        choose_leaves(-1, 10, 2, 4)
