"""Programs of what a function does on a CPU, beside the function itself."""

from __future__ import annotations

import signal
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from _recorded_graph import step_below
from softsphere import CapturedStep, FactoredSphericalLoss
from softsphere.graphs import compiled
from softsphere.graphs.tensors import place, tensors_of
from softsphere.matrix import factored_matrix, precision
from softsphere.optim import FactoredSGD

pytestmark = pytest.mark.once("a program that is compiled for a CPU")


class Memory:
    """What functions find: the inputs, and what they keep from one run to the next."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(6, 5, generator=generator)
        self.y = torch.randn(5, 5, generator=generator)
        self.at = torch.tensor([3, 0, 3, 1, 1, 3])
        self.kept, self.pairs = torch.zeros(6, 5), torch.ones(3, 2)
        self.table = torch.randn(9, 5, generator=generator)
        self.norm = nn.BatchNorm1d(5)
        self.trunk = nn.Linear(5, 5)
        with torch.no_grad():
            self.trunk.weight.copy_(self.y)
        self.sgd = torch.optim.SGD(self.trunk.parameters(), lr=0.1, momentum=0.9, fused=True)
        self.rate = torch.tensor(0.1)
        self.adamw = torch.optim.AdamW(
            [nn.Parameter(self.table.clone())], lr=self.rate, capturable=True, fused=True
        )

    def state(self) -> list[torch.Tensor]:
        of_adamw = self.adamw.param_groups[0]["params"]
        return [
            self.kept,
            self.pairs,
            self.table,
            self.at,
            *self.norm.buffers(),
            *self.trunk.parameters(),
            *of_adamw,
        ]


def in_place(m):
    return m.kept.add_(m.x).mul_(0.5), m.kept[1:].sub_(1).sum()


def into_a_part(m):
    whole = m.x.new_empty(7, 5)
    torch.mm(m.x, m.y, out=whole[:6])
    torch.mv(m.y, m.x[0], out=whole[6])
    return whole.sum(0), whole[2:].mT.exp()


def parts_that_overlap(m):
    m.kept[:3].add_(m.kept[3:])
    return m.kept.mT @ m.x


def sums_with_a_factor(m):
    product = m.x @ m.y
    own = torch.add(m.x, product, alpha=0.5)
    torch.sub(own, product, alpha=3, out=own)
    return own, m.x.sub(product, alpha=0.25), product.clone().add_(m.x @ m.y, alpha=-2)


def one_number_for_all(m):
    return m.x.sum().expand(3, 4), m.x[:1].expand(6, 5)


def rows_of_a_table(m):
    m.table.index_add_(0, m.at, m.x)
    m.table.index_copy_(0, m.at[:1], m.table[m.at[:1]] * 2)
    return m.table.index_select(0, m.at), m.table[m.at[:2]]


def several_at_once(m):
    pair = torch._foreach_mul([m.x, m.y], 2.0)
    torch._foreach_add_([m.kept, m.table], 1.0)
    return *pair, *m.x.split([2, 4]), *m.y.sort()


def numbers_of_python(m):
    total = torch.tensor(1.0)
    total += m.x.sum()
    return total


def batch_norm(m):
    return m.norm(m.x)


def fused_sgd(m):
    m.sgd.zero_grad()
    loss = m.trunk(m.x).square().sum()
    loss.backward()
    m.sgd.step()
    return loss.detach()


def fused_adamw(m):
    (p,) = m.adamw.param_groups[0]["params"]
    m.adamw.zero_grad()
    loss = (p.square().sum() * m.x[0, 0]).exp()
    loss.backward()
    m.adamw.step()
    return loss.detach()


def conjugates(m):
    z = torch.complex(m.x, m.x.flip(0))
    return (z * z.conj()).real, (z.conj() * z.flip(1)).imag


def parts_as_complex_numbers(m):
    m.pairs.mul_(0.5)
    return torch.view_as_complex(m.pairs).abs(), m.pairs.sum()


def integers_in_place(m):
    m.at.sub_(1).clamp_(min=0)
    return m.table[m.at], m.at.float()


def parts_without_numbers(m):
    return m.kept[:0].sum() + m.kept[1:].sum(), m.kept[:2].add_(1)


def by_masks(m):
    own = m.x.clone()
    own[m.x > 0] = 0.5
    m.kept[m.x < 0] = 2.0
    m.at[m.at == 3] = 2
    return own, m.kept.sum(), m.table[m.at]


def data_in_train(m):
    given = m.x.flip(0) * 3
    h = m.x * 2
    h.data = given
    return h.tanh() + m.x, m.x * 2


def shapes_in_place(m):
    y = m.x @ m.y[0]
    y.unsqueeze_(0).mul_(2)
    return y.squeeze_(0) + m.x[:, 0]


def outputs_that_share_memory(m):
    y = m.x * 2
    return y, y.view(-1), y[1:], y.detach()


FUNCTIONS = [
    *(in_place, into_a_part, parts_that_overlap, sums_with_a_factor, one_number_for_all),
    *(rows_of_a_table, several_at_once, numbers_of_python, batch_norm, conjugates),
    *(parts_as_complex_numbers, integers_in_place, parts_without_numbers, by_masks),
    *(data_in_train, shapes_in_place),
    outputs_that_share_memory,
]
STEPS = [fused_sgd, fused_adamw]


def everything(m):
    """One program of all, whose compilation takes seconds."""
    return [x for function in (*FUNCTIONS, *STEPS) for x in listed(function(m))]


def listed(outputs):
    return [x.detach() for x in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]


def runs(function, program):
    """The outputs of three runs on other inputs, and what they leave."""
    m, found = Memory(), []
    run = partial(function, m)
    run()  # so that the optimizers have their state
    if program:
        before = [x.detach().clone() for x in m.state()]
        graph = compiled.Graph(torch.device("cpu"))
        outputs = listed(graph.record(run))
        for x, wanted in zip(m.state(), before, strict=True):
            assert torch.equal(x, wanted)
        graph.fill(outputs, ())
    torch.manual_seed(1)
    for i in range(3):
        m.x.copy_(torch.randn(6, 5, generator=torch.Generator().manual_seed(i)))
        m.rate.fill_(0.1 / (1 + i))
        if program:
            graph.replay()
            found += [graph.handed_out(x) for x in outputs]
        else:
            found += [x.clone() for x in listed(run())]
    return found + [x.detach() for x in m.state()]


def compare(function):
    for got, wanted in zip(runs(function, True), runs(function, False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def by_python(monkeypatch):
    """Programs of Python in place of compiled ones, and the graphs that they were made of."""
    graphs = []

    def made(graph, inputs, options):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(compiled, "by_inductor", made)
    monkeypatch.setattr(compiled, "_programs", type(compiled._programs)())
    return graphs


@pytest.mark.usefixtures("by_python")
@pytest.mark.parametrize("function", [*FUNCTIONS, *STEPS], ids=lambda function: function.__name__)
def test_a_record_does_what_the_function_does(function):
    compare(function)


def test_a_compiled_program_does_what_the_function_does():
    compare(everything)


@pytest.mark.usefixtures("by_python")
def test_random_numbers_are_drawn_in_each_run_and_not_by_recording():
    graph, x = compiled.Graph(torch.device("cpu")), torch.ones(1000)
    before = torch.get_rng_state()
    result = graph.record(lambda: F.dropout(x, 0.5))
    graph.fill([result], ())
    assert torch.equal(torch.get_rng_state(), before)
    runs = []
    for _ in range(2):
        graph.replay()
        runs.append(graph.handed_out(result))
    assert not torch.equal(*runs)
    assert all(400 < (x == 0).sum() < 600 for x in runs)


def test_no_sum_is_left_to_the_compiler_that_has_a_factor(by_python):
    """TorchInductor of torch 2.13 loses the factor where one of the terms is a product."""
    compare(sums_with_a_factor)
    assert "alpha" not in by_python[0].code and "mul.Scalar" in by_python[0].code


@pytest.mark.usefixtures("by_python")
def test_outputs_share_no_memory_with_each_other():
    graph, x = compiled.Graph(torch.device("cpu")), torch.ones(3, 2)
    outputs = graph.record(lambda: outputs_that_share_memory(SimpleNamespace(x=x)))
    graph.fill(outputs, ())
    graph.replay()
    given = [graph.handed_out(y) for y in outputs]
    given[0].zero_()
    assert all((y == 2).all() for y in given[1:])


class ByNumPy(torch.autograd.Function):
    """Its backward pass reads values, which no mode sees."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.numpy() * 2)


def in_a_backward_pass(x):
    parameter = torch.ones(5, requires_grad=True)
    ByNumPy.apply(x * parameter).sum().backward()
    return parameter.grad


def by_a_thread(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x * 2))
    thread.start(), thread.join()
    return found[0] + 1


def with_a_seed(x):
    torch.manual_seed(3)
    return F.dropout(x, 0.5)


def checkpointed(x):
    x = x.detach().requires_grad_()
    checkpoint(lambda y: F.dropout(y, 0.5).exp(), x, use_reentrant=False).sum().backward()
    return x.grad


class Rebound:
    """Keeps the result of a step for the next one under the same name."""

    def __init__(self):
        self.mean = torch.zeros(5)

    def __call__(self, x):
        self.mean = 0.9 * self.mean + x.mean(0)
        return self.mean


def index_drawn_in_place(x):
    return x[torch.zeros(3, dtype=torch.long).random_(0, 6)]


def asserted_in_place(x):
    torch._assert_async((torch.empty(3).uniform_() < 2).all(), "drawn")
    return x + 1


NUMBERS, BATCHES = torch.ones(5), [torch.ones(5)]
GENERATOR = torch.Generator()
TABLE = torch.ones(6, 5)
COLUMN = TABLE[:, 1]
BITS = NUMBERS.view(torch.int32)
REFUSED = {
    "a thread": (by_a_thread, "does not keep"),
    "NumPy in a backward pass": (in_a_backward_pass, "does not keep"),
    "the result of the last step": (Rebound(), "does not keep"),
    "the next batch": (lambda x: BATCHES.pop() + x, "does not keep"),
    "a seed": (with_a_seed, "state of the random numbers"),
    "random numbers that come again": (checkpointed, "state of the random numbers"),
    "an assertion of numbers drawn in place": (asserted_in_place, "random numbers in place"),
    "a generator": (lambda x: torch.rand(3, generator=GENERATOR) + x[0, 0], "generator of its own"),
    "a conjugate": (lambda x: torch.complex(x, x).conj().mul_(2).real, "write through a conjugate"),
    "a part and the whole": (lambda x: (COLUMN.sum(), TABLE.add_(x))[0], "writes memory of which"),
    "two dtypes": (lambda x: BITS + NUMBERS.sum(), "memory of another"),
    "a sparse tensor": (lambda x: x.to_sparse_csr(), "sparse|a value"),
    "a shape in place": (lambda x: x.view(-1).unsqueeze_(0), "shape of a tensor in place"),
}


@pytest.mark.usefixtures("by_python")
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_program_would_do_otherwise_is_refused(what):
    function, words = REFUSED[what]
    graph, x = compiled.Graph(torch.device("cpu")), torch.ones(6, 5)
    with pytest.raises(RuntimeError, match=words):
        graph.fill([graph.record(lambda: function(x))], [x.data_ptr()])
    assert (x == 1).all()


@pytest.mark.parametrize("by", ["python", "TorchInductor"])
def test_indices_and_targets_that_are_drawn_are_those_of_the_program(by, request):
    if by == "python":
        request.getfixturevalue("by_python")
    labels, table = torch.tensor([3, 1, 4, 1, 5, 2]), torch.eye(6)

    def function():
        order = torch.randperm(6)
        masked = torch.where(torch.rand(6) < 0.5, labels, -100)
        torch._assert_async(((masked < 6) | (masked == -100)).all(), "a label is wrong")
        loss = F.cross_entropy(10 * table[labels], masked, ignore_index=-100, reduction="none")
        return order, labels[order], table[order], masked, loss + torch.rand(6)

    graph = compiled.Graph(torch.device("cpu"))
    result = graph.record(function)
    graph.fill(result, ())
    runs = []
    for _ in range(4):
        graph.replay()
        order, shuffled, rows, masked, loss = (graph.handed_out(x) for x in result)
        assert torch.equal(shuffled, labels[order]) and torch.equal(rows, table[order])
        assert ((masked == labels) | (masked == -100)).all()
        assert torch.equal(loss < 1.0, torch.ones(6).bool()) and (loss >= 0).all()
        runs.append([*order.tolist(), *masked.tolist()])
    assert len({tuple(run) for run in runs}) > 1
    labels[2] = 6
    before, told = torch.get_rng_state(), ""
    while not told:  # it is left out at random
        before = torch.get_rng_state()
        try:
            graph.replay()
        except ValueError as error:
            told = str(error)
    assert "must be in" in told or "is wrong" in told
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("by_python")
def test_what_is_drawn_and_changed_in_place_is_changed_once():
    table, graph = torch.arange(7.0), compiled.Graph(torch.device("cpu"))

    def function():
        index = torch.randperm(6)
        index.add_(1)
        return table[index], index

    result = graph.record(function)
    graph.fill(result, ())
    graph.replay()
    rows, index = (graph.handed_out(x) for x in result)
    assert sorted(index.tolist()) == [1, 2, 3, 4, 5, 6] and torch.equal(rows, table[index])


@pytest.mark.usefixtures("by_python")
def test_memory_in_whose_place_other_memory_has_come_is_noticed():
    norm, x, given = nn.BatchNorm1d(5), torch.randn(6, 5), torch.zeros(5)
    for change in (
        lambda: setattr(norm, "running_mean", given),
        lambda: setattr(norm.weight, "data", given.clone()),
        lambda: norm.load_state_dict(nn.BatchNorm1d(5).state_dict(), assign=True),
    ):
        graph = compiled.Graph(torch.device("cpu"))
        graph.fill([graph.record(lambda: norm(x).detach())], ())
        assert graph.is_current()
        change()
        assert not graph.is_current()


INDEXED = {
    "embedding": lambda W, at: F.embedding(at, W),
    "embedding_bag": lambda W, at: F.embedding_bag(at, W, offsets=torch.tensor([0, 2])),
    "cross_entropy": lambda W, at: F.cross_entropy(W.mT[: len(at)], at),
    "index": lambda W, at: W[:, at[:1] % 2][at],
    "index_select": lambda W, at: W.index_select(0, at),
    "gather": lambda W, at: W.gather(0, at.unsqueeze(1)),
    "scatter": lambda W, at: W.scatter(0, at.unsqueeze(1), 0.0),
    "index_add": lambda W, at: torch.index_add(W, 0, at, torch.ones(len(at), 4)),
}


@pytest.mark.usefixtures("by_python")
@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("wrong", [7, -8, 1 << 40])
def test_a_wrong_index_is_told_before_anything_changes(name, wrong):
    W, at, total = torch.ones(7, 4), torch.tensor([0, 3, 6]), torch.zeros(())
    graph = compiled.Graph(torch.device("cpu"))

    def function():
        total.add_(1.0)
        return INDEXED[name](W, at)

    result = graph.record(function)
    graph.fill([result], ())
    graph.replay()
    assert torch.equal(graph.handed_out(result), INDEXED[name](W, at))
    at[1] = wrong
    with pytest.raises(ValueError, match=r"must be in \[-?\d, 7\)"):
        graph.replay()
    with pytest.raises(ValueError, match=r"must be in \[-?\d, 7\)"):
        compiled.Graph(torch.device("cpu")).record(function)
    assert total == 1


TWICE = {
    "columns": lambda W, at: F.embedding(at[:, 0], W) + F.embedding(at[:, 1], W[:3]),
    "an offset": lambda W, at: F.embedding(at + torch.tensor([0, 4]), W),
    "a smaller table": lambda W, at: W[at[:, 1]] + W[:3][at[:, 1]],
    "written in between": lambda W, at: (W[at[:, 0]], at.mul_(2), W[at[:, 0]])[2],
    "of floats": lambda W, at: F.embedding(at.float().mul(1.5).long(), W),
}


@pytest.mark.usefixtures("by_python")
@pytest.mark.parametrize("name", TWICE)
def test_each_index_is_asserted_for_its_own_bounds(name):
    W, at = torch.ones(7, 4), torch.tensor([[0, 1], [3, 2]])
    graph = compiled.Graph(torch.device("cpu"))
    result = graph.record(lambda: TWICE[name](W, at))
    graph.fill([result], ())
    graph.replay()
    at.copy_(torch.tensor([[0, 1], [4, 5]]))
    with pytest.raises(ValueError, match="must be in"):
        graph.replay()


@pytest.mark.usefixtures("by_python")
def test_an_assertion_sees_what_train_has_done_with_its_inputs():
    """As with labels that are counted from 1, and a last one that is filled in."""
    graph, labels, table = (
        compiled.Graph(torch.device("cpu")),
        torch.tensor([1, 5, 5]),
        torch.eye(5),
    )

    def function():
        own = labels.sub_(1).clone()
        own[-1:].fill_(2)
        torch._assert_async(((own >= 0) & (own < 5)).all(), "a label is wrong")
        return table[own]

    result = graph.record(function)
    graph.fill([result], ())
    assert labels.tolist() == [1, 5, 5]
    for given in ([1, 5, 99], [2, 1, 0]):
        labels.copy_(torch.tensor(given))
        graph.replay()
        want = [*(x - 1 for x in given[:2]), 2]
        assert graph.handed_out(result).argmax(1).tolist() == want
        assert labels.tolist() == [x - 1 for x in given]
    labels.copy_(torch.tensor([0, 5, 5]))
    with pytest.raises(ValueError, match=r"^a label is wrong$"):
        graph.replay()
    assert labels.tolist() == [0, 5, 5]


READERS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.sum() > 0),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "adding by a mask": lambda x: x.clone().index_put_((x > 0,), x.new_ones(1), accumulate=True),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().abs().flatten().bincount(),
    "float": lambda x: float(x.sum()),
    "print": lambda x: str(x),
    "format": lambda x: f"{x.sum():.1f}",
    "a list of numbers": lambda x: torch.tensor([x[0, 0], x[0, 1]]),
    "an array of a list": lambda x: torch.asarray([x[0, 0]]),
    "a new tensor of a list": lambda x: x.new_tensor([x[0, 0], 1.0]),
    "a legacy list of numbers": lambda x: torch.FloatTensor([x[0, 0], x[0, 1]]),
    "tensor_split": lambda x: x.tensor_split(torch.tensor([1])),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(6).long(), 0),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_a_value_is_refused(reader):
    graph = compiled.Graph(torch.device("cpu"))
    x = torch.randn(6, 5)
    told = r"read a value, as .* does in line \d+ of test_compiled.py.* leave compile out"
    with pytest.raises(RuntimeError, match=told):
        graph.record(lambda: READERS[reader](x))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here")
def test_what_a_backward_pass_of_a_program_could_not_take_is_refused():
    lstm, graph = nn.LSTM(4, 4), compiled.Graph(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"must not call mkldnn_rnn_layer.*leave compile out"):
        graph.record(lambda: lstm(torch.ones(3, 2, 4))[0].sum().backward())


def test_memory_that_is_written_is_not_copied_to_record_it():
    """That of W may be most of what the machine has."""
    W, made = torch.zeros(1000, 100), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            made.extend(x.numel() for x in tensors_of(result) if place(x) != place(W))
            return result

    def function():
        W.add_(1.0)
        W.index_add_(0, torch.tensor([3]), torch.ones(1, 100))

    graph = compiled.Graph(torch.device("cpu"))
    with Sizes():
        graph.record(function)
    assert made and max(made) < W.numel() and not W.any()


@pytest.mark.usefixtures("by_python")
def test_what_is_not_filled_has_no_value():
    graph, kept = compiled.Graph(torch.device("cpu")), []
    x = torch.ones(3)

    def function():
        kept.append(x * 2)
        return kept[0] + 1

    result = graph.record(function)
    graph.fill([result], ())
    graph.replay()
    assert torch.equal(result, torch.full((3,), 3.0)) and kept[0].isnan().all()


@pytest.mark.usefixtures("by_python")
def test_an_assertion_is_looked_at_before_anything_changes():
    graph, x, total = compiled.Graph(torch.device("cpu")), torch.ones(3), torch.zeros(())

    def function():
        total.add_(x.sum())
        torch._assert_async((x > 0).all(), "x must be positive")

    graph.record(function)
    graph.fill([], ())
    graph.replay()
    x[1] = -1
    with pytest.raises(ValueError, match=r"^x must be positive$"):
        graph.replay()
    assert total == 3


@pytest.mark.usefixtures("by_python")
def test_what_comes_after_a_fused_optimizer_and_needs_it_is_refused():
    m = Memory()
    fused_sgd(m)
    graph = compiled.Graph(torch.device("cpu"))
    graph.record(lambda: (fused_sgd(m), m.trunk.weight.sum()))
    with pytest.raises(RuntimeError, match=r"optimizers last: .*_fused_sgd_.* aten::sum"):
        graph.fill([], ())


def training(d=4, D=30, **options):
    torch.manual_seed(0)
    head = FactoredSphericalLoss(d, D)
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = FactoredSGD(head.parameters(), **{"lr": rate, "capturable": True} | options)

    def batch(i):
        generator = torch.Generator().manual_seed(i)
        hidden = torch.randn(3, d, generator=generator)
        return hidden, torch.randint(D, (3,), generator=generator)

    return head, optimizer, step_below(head, optimizer), batch


def test_compiled_steps_of_a_factored_layer_are_those_of_python():
    """By TorchInductor, in float32."""
    head, optimizer, train, batch = training()
    step = CapturedStep(train, optimizer, *batch(0), compile=True)
    other, _, plain, _ = training()
    for i in range(12):
        for got, wanted in zip(step(*batch(i)), plain(*batch(i)), strict=True):
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-4)
    assert step.captures
    torch.testing.assert_close(head.dense(), other.dense(), rtol=1e-4, atol=1e-4)
    assert head.health(probes=4).gram_drift < 1e-4


@pytest.mark.slow
def test_a_trunk_that_is_compiled_by_itself_is_recorded():
    """PyTorch runs it as it is meanwhile; what it compiled would be no operation to record."""
    results = []
    for is_compiled in (True, False):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        head, _, _, batch = training()
        rate = torch.tensor(0.5, dtype=torch.float64)
        below = {"params": trunk.parameters(), "lr": 0.05}
        groups = [{"params": head.parameters(), "lr": rate}, below]
        optimizer = FactoredSGD(groups, capturable=True)
        if is_compiled:
            trunk.compile()

        def train(hidden, target, trunk=trunk, head=head, optimizer=optimizer):
            optimizer.zero_grad()
            loss = head(trunk(hidden), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = CapturedStep(train, optimizer, *batch(0), compile=True) if is_compiled else train
        losses = [step(*batch(i)) for i in range(12)]
        results.append([*losses, *(p.detach() for p in trunk.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def steps_taken(step, batch, count=8):
    for i in range(count):
        step(*batch(i))


@pytest.mark.usefixtures("by_python")
@pytest.mark.parametrize("target", [30, -1, 2**40])
@pytest.mark.parametrize("taken", [0, 3, 10], ids=["by Python", "recorded", "by a program"])
def test_a_target_that_is_no_class_is_told_and_changes_nothing(target, taken):
    head, optimizer, train, batch = training()
    runs = []

    def counted(*inputs):
        runs.append(inputs)
        return train(*inputs)

    step = CapturedStep(counted, optimizer, *batch(0), compile=True)
    steps_taken(step, batch, taken)
    W, before = head.matrix.arrays, len(runs)
    arrays = W.V.blocks[0], *W.small_state().values()
    kept = [x.clone() for x in arrays]
    hidden, wrong = batch(0)
    wrong[1] = target
    with pytest.raises(ValueError, match=r"target must be in \[0, 30\)"):
        step(hidden, wrong)
    assert (len(runs) == before) == (taken == 10)
    assert all(torch.equal(x, y) for x, y in zip(arrays, kept, strict=True))
    wrong[1] = -100  # the row is ignored
    assert step(hidden, wrong)[0].isfinite() and not torch.equal(arrays[0], kept[0])


@pytest.mark.usefixtures("by_python")
def test_a_step_that_a_program_left_undone_is_finished_without_looking_at_values(monkeypatch):
    """So that one that cannot be taken is left out, and not written before it is looked at."""
    head, optimizer, train, batch = training()
    step = CapturedStep(train, optimizer, *batch(0), compile=True)
    steps_taken(step, batch, 10)
    looked = []

    def seen(W, *given, **options):
        looked.append(not precision.is_asynchronous(W.device))
        return planned(W, *given, **options)

    planned = factored_matrix.plan
    monkeypatch.setattr(factored_matrix, "plan", seen)
    head.matrix.watch.period = 100  # no measurement finds it
    optimizer.param_groups[0]["lr"].fill_(30.0)
    step(*batch(10))
    assert head.matrix.watch.undone.any() and not looked
    head.dense()
    assert looked and not any(looked) and not head.matrix.watch.undone.any()


def test_a_weight_whose_factors_were_renewed_is_stepped_by_python(by_python):
    """Until it is written anew, as where it is saved; no other program is made for it."""
    head, optimizer, train, batch = training()
    step = CapturedStep(train, optimizer, *batch(0), compile=True)
    other, _, plain, _ = training()
    made = []
    for i in range(30):
        if i == 10:
            head.matrix.renew_(), other.matrix.renew_()
        if i == 20:
            head.state_dict(), other.state_dict()
        for got, wanted in zip(step(*batch(i)), plain(*batch(i)), strict=True):
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-4)
        made.append(step.captures)
    assert 0 < made[9] == made[19] < made[29]
    assert len(by_python) <= made[9]
    torch.testing.assert_close(head.dense(), other.dense(), rtol=1e-4, atol=1e-4)


def test_equal_steps_share_a_program(by_python):
    for _ in range(2):
        _, optimizer, train, batch = training()
        step = CapturedStep(train, optimizer, *batch(0), compile=True)
        steps_taken(step, batch)
        assert step.captures
        found = len(by_python)
    assert len(by_python) == found > 0


@pytest.mark.usefixtures("by_python")
def test_what_was_handed_out_stays_and_no_gradient_is_kept():
    head, optimizer, train, batch = training()
    step = CapturedStep(train, optimizer, *batch(0), compile=True)
    steps_taken(step, batch)
    outputs = step(*batch(8))
    before = [x.clone() for x in outputs]
    step(*batch(9))
    assert all(torch.equal(x, y) for x, y in zip(outputs, before, strict=True))
    assert all(p.grad is None for p in head.parameters())


def test_a_compiler_that_fails_is_told_and_leaves_the_weight_as_it_was(monkeypatch):
    head, optimizer, train, batch = training()
    step = CapturedStep(train, optimizer, *batch(0), compile=True)

    def fails(*_):
        raise FileNotFoundError("no g++")

    monkeypatch.setattr(compiled, "by_inductor", fails)
    monkeypatch.setattr(compiled, "_programs", {})
    steps_taken(step, batch, 3)
    before = head.dense()
    with pytest.raises(RuntimeError, match=r"cannot compile the step: no g.*leave compile out"):
        steps_taken(step, batch, 1)
    assert torch.equal(head.dense(), before)
    steps_taken(train, batch)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.usefixtures("by_python")
def test_a_ctrl_c_ends_a_compilation_and_leaves_the_weight_as_it_was(monkeypatch):
    head, optimizer, train, batch = training()
    step = CapturedStep(train, optimizer, *batch(0), compile=True)
    other, _, plain, _ = training()

    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    steps_taken(step, batch, 3), steps_taken(plain, batch, 3)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "by_inductor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(*batch(3))
    for i in range(3, 8):
        step(*batch(i)), plain(*batch(i))
    assert step.captures
    torch.testing.assert_close(head.dense(), other.dense(), rtol=1e-4, atol=1e-4)


def test_an_optimizer_that_no_program_can_hold_is_refused():
    _, optimizer, train, batch = training(capturable=False, lr=0.5)
    with pytest.raises(TypeError, match="capturable=True"):
        CapturedStep(train, optimizer, *batch(0), compile=True)
    trunk = nn.Linear(4, 4)
    adamw = torch.optim.AdamW(trunk.parameters(), capturable=True)
    _, optimizer, train, batch = training()
    with pytest.raises(
        TypeError, match=r"fused=True and capturable=True.*got an AdamW without fused"
    ):
        CapturedStep(train, [optimizer, adamw], *batch(0), compile=True)
