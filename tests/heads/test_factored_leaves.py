"""What a step of factored leaves costs, and how exact many of them are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from softsphere import ClusteredLoss, FactoredSphericalLoss
from softsphere.optim import FactoredSGD

d, C = 16, 8


def layer(size: int, clusters: int = C, **options) -> ClusteredLoss:
    assignment = torch.arange(clusters).repeat_interleave(size)
    head = ClusteredLoss(d, len(assignment), assignment, engine="factored", **options)
    head._stack().arrays.sums()  # G is made
    return head


def targets(m: int, size: int, few: int, seed: int = 0) -> torch.Tensor:
    """Some of the first few classes of each cluster, the same ones whatever the sizes."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.randint(C, (m,), generator=generator)
    return cluster * size + torch.randint(few, (m,), generator=generator)


class Moved(TorchDispatchMode):
    """The bytes of all arguments and results of operations, and how many operations there were.

    Of a tensor that an index picks rows of, or adds rows to, only those rows count.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if func.is_view:
            return result
        picks = "index" in func.__name__ or "searchsorted" in func.__name__
        touched = [args[1:] if picks else args]
        if not (picks and func._schema.is_mutable):
            touched.append(result)
        for x in tree_iter(touched):
            if isinstance(x, torch.Tensor) and x.layout == torch.strided:
                self.bytes += x.numel() * x.element_size()
        return result


def step(head: ClusteredLoss, target: torch.Tensor, **sgd) -> tuple[int, Moved]:
    """The FLOPs and the bytes of a step, the second one of these rows."""
    optimizer = FactoredSGD(head.parameters(), lr=0.1, **sgd)
    hidden = torch.randn(len(target), d, requires_grad=True)
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, Moved() as moved:
            optimizer.zero_grad()
            head(hidden, target).backward()
            optimizer.step()
    return counter.get_total_flops(), moved


@pytest.mark.parametrize("m", [5, 60])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("counts", [False, True])
def test_a_step_costs_nothing_in_classes(counts, decay, m):
    spent = []
    for size in (30, 20_000):
        head = layer(size, counts=torch.ones(C * size) if counts else None)
        target = targets(m, size, 30)
        flops, moved = step(head, target, weight_decay=decay)
        spent.append((flops, moved.bytes))
    assert spent[0] == spent[1] > (0, 0)


def test_a_step_touches_no_cluster_without_targets():
    """There are bytes for each cluster: one number in the root, and a few beside the leaves."""
    target = torch.tensor([0, 3, 25, 25])
    bytes_of = {}
    for clusters in (4, 404):
        bytes_of[clusters] = step(layer(20, clusters), target)[1].bytes
    each = (bytes_of[404] - bytes_of[4]) / 400
    # G, U and U⁻¹ of a cluster alone have 8 (d + 1)² bytes each
    assert each < 8 * (d + 1) ** 2


def test_there_is_no_loop_over_clusters():
    operations = []
    for clusters in (3, 48):
        target = torch.arange(clusters) * 20  # one in each
        operations.append(step(layer(20, clusters), target)[1].operations)
    assert operations[0] == operations[1]


class Drift:
    """Factored and dense leaves in float32, and dense ones in float64 that both are compared with.

    The dense ones step diag(√π) [W b], as the factored ones do.
    """

    def __init__(self, leaf: str, counts: bool, common: float, **sgd: float) -> None:
        torch.manual_seed(0)
        self.assignment = torch.randint(-1, C, (400,))
        self.counts = torch.randint(1, 30, (400,)) if counts else None
        made = {"leaf": leaf, "counts": self.counts}
        self.factored = ClusteredLoss(d, 400, self.assignment, engine="factored", **made)
        state = self.factored.state_dict()
        state["weight"] += common
        self.factored.load_state_dict(state)
        self.head = ClusteredLoss(d, 400, self.assignment, engine="logits", **made)
        self.root = self.head.prior.double().sqrt().unsqueeze(1)
        self.wide = copy.deepcopy(self.head).double()
        W = self.face(self.factored)
        self.exact, self.plain = torch.nn.Parameter(W), torch.nn.Parameter(W.float())
        parameters = ([self.factored.weight], [self.exact], [self.plain])
        self.optimizers = [torch.optim.SGD(each, **sgd) for each in parameters]

    def face(self, head: ClusteredLoss) -> torch.Tensor:
        state = head.state_dict()
        return torch.cat([state["weight"], state["bias"][:, None]], 1).double() * self.root

    def step(self, hidden: torch.Tensor, target: torch.Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.factored(hidden, target).backward()
        for head, P in ((self.wide, self.exact), (self.head, self.plain)):
            W, b = (P / self.root.to(P.dtype)).split([d, 1], 1)
            parameters = {"weight": W, "bias": b.squeeze(1)}
            loss = torch.func.functional_call(head, parameters, (hidden.to(P.dtype), target))
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def errors(self) -> tuple[float, float]:
        """Of the factored and of the dense float32 leaves, relative to the size of the weight."""
        exact = self.exact.detach()
        found = self.factored.weight.to_dense().double(), self.plain.detach().double()
        factored, plain = (float((x - exact).norm() / exact.norm()) for x in found)
        return factored, plain


CASES = {
    "log-Taylor": ("taylor_softmax", True, 0.0, {"lr": 30.0}),
    "log-Taylor with decay": ("taylor_softmax", False, 0.0, {"lr": 30.0, "weight_decay": 1e-4}),
    "a large common row": ("taylor_softmax", True, 5.0, {"lr": 3.0}),
    "log-spherical": ("spherical_softmax", True, 0.0, {"lr": 30.0}),
}


def drift(name: str, steps: int) -> tuple[float, float]:
    leaf, counts, common, sgd = CASES[name]
    runs = Drift(leaf, counts, common, **sgd)
    scale, mixing = torch.logspace(0.3, -0.7, d), torch.randn(d, 400) / d**0.5
    for _ in range(steps):
        hidden = torch.randn(16, d) * scale
        runs.step(hidden, (hidden @ mixing).argmax(1))
    health = runs.factored.health()
    assert health.condition < 8
    assert health.inverse_drift < 1e-10
    assert health.gram_drift < 1e-4
    return runs.errors()


@pytest.mark.parametrize("name", CASES)
def test_float32_stays_as_near_as_dense_leaves_over_many_steps(name):
    """These are 100 steps. The slow test below takes five thousand."""
    factored, dense = drift(name, 100)
    assert factored <= 5 * dense


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_float32_stays_as_near_as_dense_leaves_over_5_000_steps(name):
    factored, dense = drift(name, 5_000)
    assert factored <= 5 * dense


def test_momentum_is_refused_before_anything_moves():
    head = layer(20)
    hidden, target = torch.randn(6, d), torch.arange(6) * 20
    optimizer = FactoredSGD(head.parameters(), lr=0.1, momentum=0.9)
    head(hidden, target).backward()
    before = {name: x.clone() for name, x in head.state_dict().items()}
    with pytest.raises(TypeError, match=r"cannot be stepped with momentum.*momentum=0"):
        optimizer.step()
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.zero_grad()
    head(hidden, target).backward()
    optimizer.step()


def test_a_layer_of_one_matrix_does_not_take_the_weight_of_a_stack():
    stack, one = layer(20), FactoredSphericalLoss(d, C * 20)
    batch = torch.randn(6, d), torch.arange(6)
    with pytest.raises(TypeError, match=r"needs the weight of one matrix, got one of a stack"):
        torch.func.functional_call(one, {"weight": stack.weight}, batch)
    with pytest.raises(TypeError, match="the weight must be the factored one of a ClusteredLoss"):
        torch.func.functional_call(stack, {"weight": one.weight}, batch)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("given", ["weight", "bias"])
def test_a_part_of_a_state_is_loaded_and_the_rest_stays(given, assign):
    head = layer(5)
    step(head, targets(4, 5, 3))
    want = {name: x.clone() for name, x in head.state_dict().items()}
    want[given] = torch.randn_like(want[given])
    keys = head.load_state_dict({given: want[given].clone()}, strict=False, assign=assign)
    assert given not in keys.missing_keys
    torch.testing.assert_close(dict(head.state_dict()), want)


def test_a_state_of_other_layers_leaves_the_leaves_and_their_gradient_alone():
    head = layer(5)
    step(head, targets(4, 5, 3))
    edition = head._stack().edition
    head.load_state_dict({"root.bias": torch.zeros_like(head.root.bias)}, strict=False)
    assert head._stack().edition == edition
