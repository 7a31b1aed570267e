"""Sampled softmax: its estimate against explicit sums, its gradients, and exact evaluation."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import _oracle
from _devices import autocasts
from _output_layers import CLOSE, Largest
from _reading import read_in_chunks
from softsphere import LinearSphericalLoss, SampledSoftmaxLoss
from softsphere.heads.negatives import Negatives

d, D, m = 6, 31, 7
COUNTS = torch.tensor([(5 * k) % D + 1 for k in range(D)])
TARGET = torch.tensor([0, 3, 3, 30, 1, 11, 0])
SAMPLERS = {
    "log_uniform": {},
    "frequency": {"counts": COUNTS},
    "square root": {"sampler": "frequency", "counts": COUNTS, "power": 0.5},
    "in_batch": {"counts": COUNTS},
    "batch alone": {"sampler": "in_batch"},
}
DRAWN = ("log_uniform", "frequency", "square root")
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_drawn = pytest.mark.parametrize("name", DRAWN)


def layer(name="log_uniform", n=10, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"sampler": name, **SAMPLERS[name], **options}
    if options["sampler"] != "in_batch":
        options["num_samples"] = n
    return SampledSoftmaxLoss(d, D, dtype=dtype, **options)


def rows(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden = 2 * torch.randn(*shape, d, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_()


def outputs(head, hidden):
    return F.linear(hidden, head.weight, head.bias)


def exact(head, hidden, target, **options):
    return F.cross_entropy(outputs(head, hidden), target, **options)


def negatives(head, target=TARGET, ignored=None):
    """Those of the next call with this seed."""
    ignored = torch.zeros(len(target), dtype=torch.bool) if ignored is None else ignored
    torch.manual_seed(3)
    found = head._sampler.choose(target, ignored, torch.float64)
    torch.manual_seed(3)
    return found


def expected(name, count=m):
    """E of every class for ten samples, or for a batch of `count` rows."""
    of_batch = [(count - 1) * float(c) / float(COUNTS.sum()) for c in COUNTS]
    log_uniform = [math.log1p(1 / (k + 1)) for k in range(D)]
    return {
        "log_uniform": lambda: _oracle.expected_counts(log_uniform, 10),
        "frequency": lambda: _oracle.expected_counts(COUNTS.tolist(), 10),
        "square root": lambda: _oracle.expected_counts([c**0.5 for c in COUNTS.tolist()], 10),
        "in_batch": lambda: of_batch,
        "batch alone": lambda: [1.0] * D,
    }[name]()


@pytest.mark.once("tables of samplers are made on a CPU, and moved by a layer")
@pytest.mark.parametrize("bias", [True, False])
@every_sampler
def test_the_estimate_is_that_of_the_explicit_sum(name, bias):
    head, hidden = layer(name, bias=bias, reduction="none"), rows(m)
    classes = negatives(head).classes
    got = head(hidden, TARGET)
    assert set(classes.tolist()) & set(TARGET.tolist())  # some are hits
    others = [classes.tolist()] * m
    if "batch" in name:
        others = [[t for j, t in enumerate(TARGET.tolist()) if j != i] for i in range(m)]
    want = [
        _oracle.sampled_softmax(o, t, others[i], expected(name))
        for i, (o, t) in enumerate(
            zip(outputs(head, hidden).tolist(), TARGET.tolist(), strict=True)
        )
    ]
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=1e-6, atol=1e-12)


@every_drawn
def test_the_sum_is_right_on_average(name):
    """The mean of Ẑ over many draws is Z, within five standard errors."""
    head, hidden, times = layer(name, reduction="none"), rows(m).detach(), 1000
    with torch.no_grad():
        Z = (head(hidden, TARGET).exp() for _ in range(times))
        Z = torch.stack(list(Z))
        want = exact(head, hidden, TARGET, reduction="none").exp()
        # The loss itself is too low, since the logarithm is concave.
        assert Z.log().mean() < want.log().mean()
    error = Z.std(0) / math.sqrt(times)
    assert (error > 0).all()
    assert ((Z.mean(0) - want).abs() < 5 * error).all()


def test_the_sum_over_a_batch_is_right_on_average():
    """Where the targets of the other rows are drawn from the shares of the classes."""
    head, hidden, times = layer("in_batch", reduction="none"), rows(1).detach(), 1000
    others = torch.multinomial(COUNTS.double(), times * 5, replacement=True).view(times, 5)
    target = torch.tensor([4])
    with torch.no_grad():
        Z = [head(hidden.expand(6, d), torch.cat([target, more]))[0].exp() for more in others]
        want = exact(head, hidden, target).exp()
    Z = torch.stack(Z)
    assert abs(Z.mean() - want) < 5 * Z.std() / math.sqrt(times)


@pytest.mark.parametrize("n", [D, D + 1, 1000])
@every_drawn
def test_with_all_classes_as_negatives_it_is_softmax(name, n):
    head, hidden = layer(name, n), rows(m)
    got, want = head(hidden, TARGET), exact(head, hidden, TARGET)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    parameters = [hidden, *head.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), **CLOSE
    )


def test_more_samples_come_closer_to_softmax():
    hidden, gaps = rows(m).detach(), []
    for n in (2, 8, 24):
        head = layer(n=n)
        with torch.no_grad():
            found = torch.stack([head(hidden, TARGET) for _ in range(200)])
            gaps.append(float(exact(head, hidden, TARGET) - found.mean()))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


@pytest.mark.parametrize("name", ["in_batch", "batch alone"])
def test_a_batch_of_one_row_has_no_loss_and_a_gradient_of_zero(name):
    head, hidden = layer(name), rows(1)
    loss = head(hidden, TARGET[:1])
    loss.backward()
    assert loss.item() == 0
    assert all(not x.grad.any() for x in (hidden, *head.parameters()))


@every_sampler
def test_gradients_are_those_of_finite_differences(name):
    head, hidden = layer(name), rows(m)

    def loss(hidden, W, b):
        torch.manual_seed(3)
        return torch.func.functional_call(head, {"weight": W, "bias": b}, (hidden, TARGET))

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (hidden, head.weight, head.bias), fast_mode=True)


@pytest.mark.once("tables of samplers are made on a CPU, and moved by a layer")
@pytest.mark.parametrize("bias", [True, False])
@every_sampler
def test_sparse_gradients_are_the_dense_ones_at_targets_and_negatives(name, bias):
    heads = [layer(name, bias=bias, sparse=sparse) for sparse in (True, False)]
    grads = []
    for head in heads:
        hidden, found = rows(m), negatives(head)
        head(hidden, TARGET).backward()
        grads.append([x.grad for x in head.parameters()])
    for one, two in zip(*grads, strict=True):
        assert one.is_sparse and not two.is_sparse
        torch.testing.assert_close(one.to_dense(), two, **CLOSE)
        touched = set(one.coalesce().indices()[0].tolist())
        assert touched == set(TARGET.tolist()) | set(found.classes.tolist())


# Of PyTorch's Adagrad, for sparse tensors that it makes itself.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam]
)
def test_optimizers_of_sparse_gradients_learn_a_batch_by_heart(optimizer):
    head, hidden = layer(sparse=True), rows(5)
    target = torch.tensor([0, 3, 30, 1, 11])
    steps = optimizer(head.parameters(), lr=0.5 if optimizer is not torch.optim.SparseAdam else 0.1)
    for _ in range(200):
        steps.zero_grad()
        head(hidden, target).backward()
        steps.step()
    assert head.rank(hidden, target).tolist() == [1] * 5
    assert float(head.eval()(hidden, target).detach()) < 0.2


def test_a_step_makes_nothing_of_the_size_of_the_weight():
    many, n = 100_000, 50
    head = SampledSoftmaxLoss(d, many, n, sparse=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with Largest() as seen:
        head(rows(m, dtype=torch.float32), TARGET).backward()
        optimizer.step()
    assert max(seen.made) <= (n + m) * max(d, n + m)


@every_sampler
def test_evaluation_is_exact(name):
    head, hidden = layer(name).eval(), rows(2, m)
    target = TARGET.expand(2, m)
    want = exact(head, hidden.flatten(0, 1), target.flatten())
    torch.testing.assert_close(head(hidden, target), want, rtol=1e-12, atol=0)
    grads = [
        torch.autograd.grad(x, [hidden, *head.parameters()]) for x in (head(hidden, target), want)
    ]
    torch.testing.assert_close(*grads, **CLOSE)
    read_in_chunks(head, 5)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, target), want.detach(), rtol=1e-12, atol=0)
        each = -head.log_prob(hidden).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        head.reduction = "none"
        torch.testing.assert_close(head(hidden, target), each, rtol=1e-12, atol=1e-14)
        log_p = outputs(head, hidden).log_softmax(-1)
    for mode in (True, False):
        head.train(mode)
        torch.testing.assert_close(head.log_prob(hidden).detach(), log_p, **CLOSE)
        assert torch.equal(head.predict(hidden), log_p.argmax(-1))
        assert torch.equal(head.topk(hidden, 4).indices, log_p.topk(4).indices)
        above = (log_p > log_p.gather(-1, target.unsqueeze(-1))).sum(-1)
        assert torch.equal(head.rank(hidden, target), 1 + above)


def test_evaluation_makes_no_table_of_all_outputs():
    head = SampledSoftmaxLoss(d, 5000).eval()
    read_in_chunks(head, 500)
    hidden = rows(64, dtype=torch.float32)
    with Largest() as seen, torch.no_grad():
        head(hidden, torch.arange(64))
    assert max(seen.made) < 64 * 1000


@pytest.mark.once("values are checked on a CPU alone")
@every_sampler
@pytest.mark.parametrize("training", [True, False])
def test_ignored_rows_have_no_part(name, training):
    head, hidden = layer(name, ignore_index=-1).train(training), rows(m)
    target = TARGET.clone()
    target[[1, 4]] = -1
    keep = target >= 0
    results = []
    for h, t in ((hidden, target), (hidden[keep], target[keep])):
        torch.manual_seed(3)
        loss = head(h, t)
        results.append((loss, *torch.autograd.grad(loss, [hidden, *head.parameters()])))
    torch.testing.assert_close(*results, **CLOSE)
    head.reduction = "none"
    assert head(hidden, target)[~keep].tolist() == [0, 0]
    head.ignore_index = None
    with pytest.raises(ValueError, match=r"target must be in \[0, 31\), got -1"):
        head(hidden, target)


@pytest.mark.parametrize("training", [True, False])
def test_reductions_and_leading_shapes(training):
    head = layer().train(training)
    values = {}
    for reduction in ("none", "sum", "mean"):
        head.reduction = reduction
        torch.manual_seed(3)
        values[reduction] = head(rows(m).view(m, 1, d), TARGET.view(m, 1))
    assert values["none"].shape == (m, 1)
    torch.testing.assert_close(values["sum"], values["none"].sum())
    torch.testing.assert_close(values["mean"], values["none"].mean())
    for shape in ((), (2, 3), (0,), (2, 0)):
        target = torch.zeros(shape, dtype=torch.long)
        head.reduction = "none"
        assert head(rows(*shape), target).shape == shape
        head.reduction = "sum"
        head(rows(*shape), target).backward()
    head.reduction = "mean"
    assert head(rows(0), TARGET[:0]).isnan()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.uint16])
def test_targets_may_be_of_any_integer_dtype(dtype):
    head, values = layer(), []
    for target in (TARGET, TARGET.to(dtype)):
        torch.manual_seed(3)
        values.append(head(rows(m), target))
    assert torch.equal(*values)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_that_of_float64(dtype, training, sparse):
    head = layer(dtype=dtype, sparse=sparse).train(training)
    wide = layer(sparse=sparse).train(training)
    wide.load_state_dict(head.state_dict())
    hidden, grads = rows(m, dtype=dtype), []
    for one, h in ((wide, hidden.detach().double().requires_grad_()), (head, hidden)):
        negatives(one)
        loss = one(h, TARGET)
        assert loss.dtype == h.dtype
        loss.backward()
        weight = one.weight.grad.to_dense() if one.weight.grad.is_sparse else one.weight.grad
        grads.append((loss.detach().double(), h.grad.double(), weight.double()))
    # PyTorch's own outputs of a linear layer are rounded to this precision.
    size = torch.finfo(dtype).eps * float(outputs(wide, hidden.double()).detach().abs().max())
    for got, want in zip(*grads, strict=True):
        assert float((got - want).abs().max()) < 4 * size * max(1.0, float(want.abs().max()))


def test_autocast(device):
    head, hidden = layer(dtype=torch.float32), rows(m, dtype=torch.float32)
    negatives(head)
    want, exactly = head(hidden, TARGET), head.eval()(hidden, TARGET)
    with torch.autocast(autocasts(device), torch.bfloat16):
        assert torch.equal(head(hidden, TARGET), exactly)
        head.train()
        for h in (hidden, hidden.bfloat16()):
            negatives(head)
            got = head(h, TARGET)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_its_state_is_that_of_a_linear_layer():
    linear = nn.Linear(d, D)
    for name in SAMPLERS:
        head = layer(name, dtype=torch.float32)
        assert list(head.state_dict()) == ["weight", "bias"]
        assert not list(head.buffers())
        head.load_state_dict(linear.state_dict())
        linear.load_state_dict(head.state_dict())
        other = LinearSphericalLoss(d, D, "softmax")
        other.load_state_dict(head.state_dict())
        hidden = rows(m, dtype=torch.float32)
        torch.testing.assert_close(head.eval()(hidden, TARGET), other(hidden, TARGET))
    assert list(layer(bias=False).state_dict()) == ["weight"]


def test_it_starts_as_a_linear_layer_does():
    for name in SAMPLERS:
        head = layer(name, dtype=torch.float32)
        torch.manual_seed(0)
        linear = nn.Linear(d, D)
        assert torch.equal(head.weight, linear.weight) and torch.equal(head.bias, linear.bias)


@every_sampler
def test_copies_draw_as_the_original(name):
    head, hidden = layer(name), rows(m)
    kept = io.BytesIO()
    torch.save(head, kept)
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    values = []
    for twin in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded):
        torch.manual_seed(3)
        values.append(twin(hidden, TARGET))
    assert all(torch.equal(values[0], value) for value in values)


@pytest.mark.once("tables of samplers are made on a CPU, and moved by a layer")
@pytest.mark.parametrize("moved", [False, True])
@every_sampler
def test_a_layer_without_memory_draws_as_another_when_it_has_some(name, moved):
    with torch.device("cpu" if moved else "meta"):
        head = layer(name).to("meta")
    assert head.weight.is_meta
    head.to_empty(device="cpu")
    head.load_state_dict(layer(name).state_dict())
    values = []
    for twin in (head, layer(name).half().double()):
        found = negatives(twin)
        assert isinstance(found, Negatives)
        twin.load_state_dict(head.state_dict())
        values.append(twin(rows(m), TARGET))
    assert torch.equal(*values)


@pytest.mark.once("tables of samplers are made on a CPU, and moved by a layer")
@every_sampler
def test_tables_stay_where_they_are_beside_a_device_without_float64(name, monkeypatch):
    plain = torch.Tensor.to

    def to(x, *args, **kwargs):
        if x.dtype == torch.float64 and args == (torch.device("cpu"),):
            raise TypeError("this device has no float64")
        return plain(x, *args, **kwargs)

    head, hidden = layer(name, dtype=torch.float32), rows(m, dtype=torch.float32)
    negatives(head)
    want = head(hidden, TARGET)
    monkeypatch.setattr(torch.Tensor, "to", to)
    head._apply(lambda x: x.clone())
    torch.manual_seed(3)
    assert torch.equal(head(hidden, TARGET), want)


def test_weights_may_be_tied_to_an_embedding():
    words = nn.Embedding(D, d, dtype=torch.float64, sparse=True)
    head = layer(bias=False, sparse=True)
    head.weight = words.weight
    head(words(TARGET), TARGET).backward()
    assert words.weight.grad.is_sparse


def test_a_parametrization_is_computed_once_in_a_call():
    head = layer()
    nn.utils.parametrizations.spectral_norm(head, "weight")
    seen, hidden = [], rows(m)
    head.parametrizations.weight.register_forward_hook(lambda *_: seen.append(1))
    for ask in (head, head.eval(), head.rank, lambda h, t: head.predict(h)):
        seen.clear()
        ask(hidden, TARGET)
        assert len(seen) == 1


@pytest.mark.parametrize("name", ["sampler", "num_samples", "power"])
def test_the_sampler_of_a_layer_cannot_be_changed(name):
    with pytest.raises(AttributeError):
        setattr(layer(), name, 3)


def test_a_resized_weight_needs_a_sampler_of_its_size():
    head = layer(bias=False)
    head.weight = nn.Parameter(torch.randn(D + 2, d, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight must have 31 rows.*got 33; make a new layer"):
        head(rows(m), TARGET)
    want = exact(head, rows(m), TARGET)
    torch.testing.assert_close(head.eval()(rows(m), TARGET), want)
    alone = layer("batch alone", bias=False)
    alone.weight = head.weight
    assert alone(rows(m), TARGET + 2).isfinite()
    head = layer()
    head.weight = nn.Parameter(torch.randn(D + 2, d, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"bias must have shape \(33,\).*set head\.bias"):
        head(rows(m), TARGET)


@pytest.mark.once("tables of samplers are made on a CPU, and moved by a layer")
@every_sampler
def test_a_compiled_step_is_an_eager_one(name):
    torch._dynamo.reset()
    head = layer(name)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    results = []
    for each in (compiled, head):
        hidden = rows(m)
        negatives(head)
        loss = each(hidden, TARGET)
        results.append((loss, *torch.autograd.grad(loss, [hidden, *head.parameters()])))
    torch.testing.assert_close(*results, **CLOSE)


def test_its_representation_says_what_matters():
    text = repr(layer("frequency", sparse=True))
    for part in ("6, 31", "num_samples=10", "sampler='frequency'", "bias=True", "sparse=True"):
        assert part in text
    assert "num_samples" not in repr(layer("in_batch"))


WRONG = {
    "target_values cannot be used with a SampledSoftmaxLoss.*LinearSphericalLoss": (
        lambda: layer()(rows(m), TARGET.unsqueeze(1), torch.ones(m, 1))
    ),
    "mask cannot be used with a SampledSoftmaxLoss.*LinearSphericalLoss": (
        lambda: layer()(rows(m), TARGET, mask=torch.ones(D, dtype=torch.bool))
    ),
    r"target must have the leading shape of hidden \(7,\), got \(7, 1\)": (
        lambda: layer()(rows(m), TARGET.unsqueeze(1))
    ),
    "target must hold class indices": lambda: layer()(rows(m), torch.rand(m, D)),
    r"target must be in \[0, 31\) or ignore_index = -100, got 31": (
        lambda: layer()(rows(m), TARGET + 1)
    ),
    r"hidden must have shape \(…, in_features = 6\), got \(2, 5\)": (
        lambda: layer()(torch.zeros(2, 5).double(), TARGET[:2])
    ),
    "weight must have the dtype of hidden torch.float32, got torch.float64": (
        lambda: layer()(rows(m, dtype=torch.float32), TARGET)
    ),
    "target must be on the device of hidden, cpu, got meta": (
        lambda: layer()(rows(m), TARGET.to("meta"))
    ),
    "bias must be True or False, got 1": lambda: layer(bias=1),
    "sparse must be True or False, got None": lambda: layer(sparse=None),
    "dtype must be one of": lambda: layer(dtype=torch.int64),
    "reduction must be one of": lambda: layer(reduction="avg"),
    "ignore_index must be an integer": lambda: layer(ignore_index=1.5),
    "in_features must be at least 1": lambda: SampledSoftmaxLoss(0, D),
    "num_classes must be at least 1": lambda: SampledSoftmaxLoss(d, 0),
}


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_work_is_refused(message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        WRONG[message]()


@pytest.mark.parametrize("target", [[3, -100], [3, 3, -100, -100], [0, -100], [3]])
@pytest.mark.parametrize("counts", [None, COUNTS])
def test_a_batch_that_leaves_no_negative_has_no_loss_and_no_gradient(target, counts):
    """All rows that count have one target, which is no negative of theirs."""
    head = SampledSoftmaxLoss(d, D, sampler="in_batch", counts=counts)
    hidden = torch.randn(len(target), d, requires_grad=True)
    loss = head(hidden, torch.tensor(target))
    loss.backward()
    assert loss == 0
    for x in (hidden, head.weight, head.bias):
        assert not x.grad.any()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_as_it_is_told(randomness):
    torch.manual_seed(0)
    head = SampledSoftmaxLoss(4, 50, 3)
    hidden, target = torch.randn(1, 4, 4).expand(3, 4, 4), torch.arange(4).expand(3, 4)
    losses = torch.vmap(head, randomness=randomness)(hidden, target)
    assert losses.shape == (3,) and (len(losses.unique()) == 1) == (randomness == "same")
