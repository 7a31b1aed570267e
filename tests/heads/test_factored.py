"""The factored layer: losses, gradients and steps beside a dense W, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from _cases import CASES
from _devices import autocasts
from _factored import NAMES, D, d, go_on, layer, train, unscaled
from _twin import DenseTwin
from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    SphericalLoss,
    losses,
)
from softsphere.matrix import SingularStepError
from softsphere.optim import FactoredSGD

SPHERICAL = {name: case[0] for name, case in CASES.items() if isinstance(case[0], losses.Spherical)}


# One loss that sees a shift of the outputs and one that does not are run with each of these; the
# others, which reach the matrix in the same two ways, with three of them.
SETTINGS = {
    "plain": {},
    "prior": {"prior": True},
    "bias": {"bias": True},
    "decay": {"weight_decay": 0.02},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "prior": True, "bias": True},
    "sparse": {"K": 3},
    "sparse prior bias": {"K": 3, "prior": True, "bias": True, "momentum": 0.5},
    "one row": {"m": 1},
    "one row momentum": {"m": 1, "momentum": 0.9},
    "more rows than width": {"m": 17},
    "more rows, all at once": {
        "m": 17, "momentum": 0.9, "prior": True, "bias": True, "weight_decay": 0.02,
    },
    "repeated targets": {"classes": 2},
    "repeated targets, many rows": {"m": 17, "classes": 2, "prior": True},
    "ignored rows": {"ignored": True},
    "sum": {"reduction": "sum"},
}  # fmt: skip


def batches(steps, m, d, D, K, classes, ignored):
    """Seeded batches. The columns of hidden shrink, so that some directions wear out first."""
    scale = torch.logspace(0, -1, d, dtype=torch.float64)
    for step in range(steps):
        hidden = torch.randn(m, d, dtype=torch.float64) * scale + 0.2
        target = torch.randint(classes or D, (m,) if K is None else (m, K))
        if K is not None:
            target[torch.rand(m, K) < 0.2] = -1
        if ignored and m > 1:
            target[step % m] = -100
        values = None if K is None else torch.rand(m, K, dtype=torch.float64) + 0.5
        yield hidden, target, values


THOROUGH = ("taylor_softmax", "bohning_bound")
RUNS = [
    (name, setting)
    for name in SPHERICAL
    for setting in SETTINGS
    if name in THOROUGH or setting in ("plain", "dampening", "sparse prior bias")
]


@pytest.mark.parametrize("steps", [50, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "setting"), RUNS)
def test_steps_are_those_of_the_dense_layer(name, setting, steps):
    torch.manual_seed(0)
    options = dict(SETTINGS[setting])
    m, K, classes = options.pop("m", 4), options.pop("K", None), options.pop("classes", None)
    bias, ignored = options.pop("bias", False), options.pop("ignored", False)
    reduction = options.pop("reduction", "mean")
    d, D = 5, 13
    prior = torch.rand(D).double() + 0.3 if options.pop("prior", False) else None
    kind = SPHERICAL[name]
    head = FactoredSphericalLoss(
        d, D, kind, bias=bias, prior=prior, reduction=reduction, dtype=torch.float64
    )
    rates = {"bouchard_bound": 0.01, "bohning_bound": 0.05}
    lr = 0.02 if isinstance(kind, losses.SquaredError) else rates.get(name, 0.1)
    lr = lr / (m if reduction == "sum" else 1) * (1 - options.get("momentum", 0))
    twin = DenseTwin(
        head.to_linear().weight, head.to_linear().bias, head.matrix.arrays.pi, lr=lr, **options
    )
    optimizer = FactoredSGD(head.parameters(), lr=lr, **options)
    for i, (hidden, target, values) in enumerate(batches(steps, m, d, D, K, classes, ignored)):
        if i == steps // 2:
            head.matrix.renew_()  # in few steps not every setting wears the factors out
        one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        got = head(one, target, values)
        rows = twin.loss(kind, two, target, values)
        counted = m if K is not None else int((target != -100).sum())
        want = rows.sum() / (counted if reduction == "mean" else 1)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
        twin.sgd.zero_grad()
        got.backward()
        want.backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-10)
        optimizer.step()
        twin.sgd.step()
    torch.testing.assert_close(head.dense(), twin.W.detach(), rtol=1e-10, atol=1e-10)
    health = head.health()
    assert health.inverse_drift < 1e-10
    assert health.gram_drift < 1e-10


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_and_hidden_gradient_are_those_of_the_criterion_on_logits(name, prior):
    counts = torch.arange(1.0, D + 1) if prior else None
    head = layer(name, prior=counts)
    train(head, 5, lr=0.05).zero_grad()
    linear = head.to_linear()
    criterion = SphericalLoss(name, prior=None if counts is None else counts.double())
    one = torch.randn(2, 3, d, dtype=torch.float64, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    target = torch.randint(D, (2, 3))
    target[0, 1] = -100
    got = head(one, target)
    want = criterion(linear(two).movedim(-1, 1), target)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    got.backward()
    want.backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)
    G = unscaled(head)
    pi = 1 if head.matrix.arrays.pi is None else head.matrix.arrays.pi.unsqueeze(1)
    torch.testing.assert_close(pi * G[:, :d], linear.weight.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((pi * G)[:, d], linear.bias.grad, rtol=1e-9, atol=1e-12)


def test_uneven_upstream_gradients_accumulate():
    head = layer(reduction="none")
    hidden, target = torch.randn(2, 5, d).double(), torch.randint(D, (2, 5))
    upstream = torch.randn(2, 5).double()
    head(hidden[0], target[0]).backward(upstream[0])
    head(hidden[1], target[1]).backward(upstream[1])
    twice = unscaled(head)
    other = layer(reduction="none")
    (other(hidden, target) * upstream).sum().backward()
    torch.testing.assert_close(twice, unscaled(other))


def test_one_layer_used_twice_in_one_graph_counts_twice():
    head, other = layer(), layer()
    hidden, target = torch.randn(2, 4, d).double(), torch.randint(D, (2, 4))
    (head(hidden[0], target[0]) + head(hidden[1], target[1])).backward()
    other(hidden[0], target[0]).backward()
    other(hidden[1], target[1]).backward()
    torch.testing.assert_close(
        unscaled(head),
        unscaled(other),
    )


@pytest.mark.parametrize("zero", ["optimizer", "module"])
def test_zero_grad_forgets(zero):
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=0.1)
    before = head.dense()
    head(torch.randn(3, d).double(), torch.randint(D, (3,))).backward()
    (optimizer if zero == "optimizer" else nn.Sequential(head)).zero_grad()
    optimizer.step()
    assert torch.equal(head.dense(), before)
    hidden, target = torch.randn(3, d).double(), torch.randint(D, (3,))
    head(hidden, target).backward()
    other = layer()
    other(hidden, target).backward()
    torch.testing.assert_close(
        unscaled(head),
        unscaled(other),
    )


def test_nothing_changes_before_step_and_nothing_is_recorded_without_a_graph():
    head = layer()
    before = head.dense()
    hidden, target = torch.randn(3, d).double(), torch.randint(D, (3,))
    with torch.no_grad():
        assert not head(hidden, target).requires_grad
    head.eval()
    head(hidden, target).backward()
    assert torch.equal(head.dense(), before)


def test_a_gradient_is_not_stepped_or_added_to_twice():
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=0.1)
    hidden, target = torch.randn(3, d).double(), torch.randint(D, (3,))
    head(hidden, target).backward()
    head.state_dict()  # writes the factors anew, but W is the same
    optimizer.step()
    for again in (optimizer.step, lambda: head(hidden, target).backward()):
        with pytest.raises(RuntimeError, match="zero_grad"):
            again()
    optimizer.zero_grad()
    head(hidden, target).backward()
    optimizer.step()


def test_backward_after_a_step_is_refused():
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=0.1)
    loss = head(torch.randn(3, d).double(), torch.randint(D, (3,)))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed since this loss was computed"):
        loss.backward()


def test_two_layers_in_one_model_do_not_know_of_each_other():
    one, two = layer(), layer("squared_error")
    lone = layer()
    optimizer = FactoredSGD(
        [{"params": one.parameters(), "lr": 0.3}, {"params": two.parameters(), "lr": 0.01}]
    )
    alone = FactoredSGD(lone.parameters(), lr=0.3)
    for _ in range(4):
        hidden, target = torch.randn(3, d).double(), torch.randint(D, (3,))
        optimizer.zero_grad()
        alone.zero_grad()
        (one(hidden, target) + two(hidden, target)).backward()
        lone(hidden, target).backward()
        optimizer.step()
        alone.step()
    assert torch.equal(one.dense(), lone.dense())


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_leading_shapes(shape, reduction):
    head = layer(reduction=reduction)
    hidden, target = torch.randn(*shape, d).double(), torch.randint(D, shape)
    loss = head(hidden, target)
    assert loss.shape == (shape if reduction == "none" else ())
    assert head.predict(hidden).shape == shape
    assert head.topk(hidden, 3).values.shape == (*shape, 3)
    assert head.rank(hidden, target).shape == shape
    assert head.log_prob(hidden).shape == (*shape, D)


def test_an_empty_batch_and_a_wholly_ignored_one():
    head = layer(reduction="sum")
    optimizer = FactoredSGD(head.parameters(), lr=0.1)
    before = head.dense()
    head(torch.zeros(0, d).double(), torch.zeros(0, dtype=torch.long)).backward()
    head(torch.randn(2, d).double(), torch.tensor([-100, -100])).backward()
    optimizer.step()
    torch.testing.assert_close(head.dense(), before, rtol=0, atol=0)
    mean = layer()
    assert mean(torch.randn(2, d).double(), torch.tensor([-100, -100])).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs(dtype, device):
    head = layer(dtype=torch.float32)
    hidden, target = torch.randn(3, d), torch.randint(D, (3,))
    half = hidden.to(dtype).requires_grad_()
    with torch.autocast(autocasts(device), dtype=dtype):
        loss = head(half, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head(half.float(), target))
    loss.backward()
    assert half.grad.dtype == dtype


def test_inside_a_compiled_model():
    head = layer(dtype=torch.float32)
    trunk = nn.Linear(d, d)

    def whole(x, target):
        return head(trunk(x).relu(), target)

    x, target = torch.randn(3, d), torch.randint(D, (3,))
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.compile(whole, backend="aot_eager")(x, target), whole(x, target)
    )


@pytest.mark.parametrize("renewed", [0, 3])
@pytest.mark.parametrize("way", ["autocast", "medium"])
def test_reduced_precision_around_the_layer_does_not_round_it(way, renewed, device):
    """Autocast would round V when it is rewritten. What is read and saved stays the same."""
    heads = [layer(dtype=torch.float32) for _ in range(2)]
    optimizers = [FactoredSGD(head.parameters(), lr=0.5) for head in heads]
    for head, optimizer in zip(heads, optimizers, strict=True):
        for seed in range(renewed):
            go_on(head, optimizer, 2, 4, seed)
            head.matrix.renew_()
    rows, target = torch.randn(4, d), torch.randint(D, (4,))
    results = []
    for head, optimizer, inside in zip(heads, optimizers, (False, True), strict=True):
        optimizer.zero_grad()
        if inside and way == "medium":
            torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast(
                autocasts(device), torch.bfloat16, enabled=inside and way == "autocast"
            ):
                head.state_dict()
                kept = head.dense()
                head(rows, target).backward()
                optimizer.step()
                head.matrix.renew_()
                results.append((kept, head.topk(rows, 3).values, head.dense()))
        finally:
            torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-7)
    if way == "autocast":
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_a_renewal_that_fails_changes_nothing(monkeypatch):
    head = layer()
    train(head, 5)
    head.matrix.renew_()
    train(head, 5, seed=2)
    before = head.dense()

    def full(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(head.matrix.arrays.generations), "counts", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        head.matrix.renew_()
    head.matrix.arrays.changed()
    torch.testing.assert_close(head.dense(), before)


def test_prediction_in_inference_mode_does_not_bind_training():
    head = layer(dtype=torch.float32)
    rows, target = torch.randn(4, d), torch.randint(D, (4,))
    with torch.inference_mode():
        head.topk(rows, 2)
        head(rows, target)
    optimizer = train(head, 2)
    head.matrix.renew_()
    with torch.inference_mode():
        head.topk(rows, 2)
    go_on(head, optimizer, 2, 4, 3)


def test_the_gradient_by_hidden_alone_leaves_the_weights_alone():
    head, hidden = layer(), torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    loss = head(hidden, torch.tensor([0, 1, 1]))
    (by_hidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert head.weight.grad is None
    loss.backward()
    assert head.weight.grad is not None
    torch.testing.assert_close(hidden.grad, by_hidden)


WRONG = {
    "features": (lambda h: h(torch.zeros(2, d + 1), torch.tensor([0, 1])), "in_features = 6"),
    "integers": (lambda h: h(torch.zeros(2, d).long(), torch.tensor([0, 1])), "floating-point"),
    "target shape": (lambda h: h(torch.zeros(2, d), torch.zeros(3).long()), "leading shape"),
    "target range": (lambda h: h(torch.zeros(2, d), torch.tensor([0, D])), r"\[0, 31\)"),
    "probabilities": (lambda h: h(torch.zeros(2, d), torch.zeros(2, D)), "class indices"),
    "values shape": (
        lambda h: h(torch.zeros(2, d), torch.zeros(2, 2).long(), torch.zeros(2, 3)),
        "target_values",
    ),
    "k": (lambda h: h.topk(torch.zeros(2, d), D + 1), "k must be"),
    "classes": (lambda h: h.log_prob(torch.zeros(2, d), torch.tensor([D])), "classes must be"),
    "rank": (lambda h: h.rank(torch.zeros(2, d), torch.tensor([0, -1])), "target must be"),
    "loss": (lambda h: FactoredSphericalLoss(d, D, "softmax"), "spherical"),
    "unknown": (lambda h: FactoredSphericalLoss(d, D, "softsphere"), "taylor_softmax"),
    "width": (lambda h: FactoredSphericalLoss(0, D), "in_features must be at least 1"),
    "prior": (lambda h: FactoredSphericalLoss(d, D, prior=torch.ones(D - 1)), "prior must have"),
    "half": (lambda h: FactoredSphericalLoss(d, D, dtype=torch.float16), "float32 or float64"),
}  # fmt: skip


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    call, words = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=words):
        call(layer(dtype=torch.float32))


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("prior", [False, True])
def test_training_that_diverges_ends_before_the_weight_overflows(prior, momentum):
    torch.manual_seed(0)
    counts = torch.rand(500) + 0.01 if prior else None
    head = FactoredSphericalLoss(8, 500, "bohning_bound", prior=counts)
    optimizer = FactoredSGD(head.parameters(), lr=50.0, momentum=momentum)
    hidden, target = torch.randn(32, 8), torch.randint(500, (32,))
    told, before = "", head.dense()
    for _ in range(200):
        optimizer.zero_grad()
        head(hidden, target).backward()
        before = head.dense()
        try:
            optimizer.step()
        except SingularStepError as error:
            told = str(error)
            break
    # the squares of the outputs overflow before those of the weight, or after them
    assert "lower lr" in told and ("squares overflow" in told or "not finite" in told)
    assert before.isfinite().all() and before.abs().max() > 1e6
    torch.testing.assert_close(head.dense(), before)


def test_a_mask_of_classes_is_for_the_other_layer():
    head = FactoredSphericalLoss(d, D)
    with pytest.raises(TypeError, match=r"mask cannot be used.*LinearSphericalLoss"):
        head(torch.randn(2, d), torch.arange(2), mask=torch.ones(D, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["one matrix", "a matrix for each cluster"])
def test_the_targets_of_a_common_class_are_added_as_one(kind):
    """Each of them alone is smaller than the last digit of the class's row."""
    torch.manual_seed(0)
    m, classes, width = 4096, 64, 4
    hidden, target = torch.randn(m, width) * 0.3, torch.arange(m) % 2
    if kind == "one matrix":
        made = FactoredSphericalLoss(width, classes)
    else:
        made = ClusteredLoss(width, classes, torch.arange(classes) % 2, engine="factored")
    moved = []
    for dtype in (torch.float32, torch.float64):
        head = copy.deepcopy(made) if dtype == torch.float32 else made.to(dtype)
        before = head.weight.detach().to_dense()[:2].double()
        head(hidden.to(dtype), target).backward()
        torch.optim.SGD(head.parameters(), lr=1e-4).step()
        moved.append(head.weight.detach().to_dense()[:2].double() - before)
    found, wanted = moved
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
