"""Accumulated over batches with one Gram matrix, gradients are those of plain accumulation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from _accumulation import TIGHT, D, batches, d, layer, run, same
from _cases import CASES
from _devices import autocasts
from _engines import SPHERICAL
from softsphere import LinearSphericalLoss, LinearSphericalOptions


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SPHERICAL)
def test_it_is_plain_accumulation(name, bias, prior, before):
    head = layer(SPHERICAL[name], bias, prior)
    twin = copy.deepcopy(head)
    if before:  # there are gradients already
        run(head, batches(1))
        run(twin, batches(1))
    mine, theirs = batches(), batches()
    with head.accumulate():
        run(head, mine)
    run(twin, theirs)
    same(head, twin)
    for (x, _), (y, _) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, **TIGHT)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_gets_nothing(frozen):
    head, twin = layer(), layer()
    for x in (head, twin):
        getattr(x, frozen).requires_grad_(False)
    with head.accumulate():
        run(head, batches())
    run(twin, batches())
    same(head, twin)


def test_sparse_targets_retained_graphs_and_one_sum_of_two():
    head, twin = layer(), layer()
    hidden, target = torch.randn(2, 4, d).double(), torch.randint(D, (2, 4, 3))
    values = torch.randn(2, 4, 3).double()

    def work(x):
        loss = x(hidden[0], target[0], values[0]) + x(hidden[1], target[1], values[1])
        loss.backward(retain_graph=True)
        loss.backward()

    with head.accumulate():
        work(head)
    work(twin)
    same(head, twin)


def test_a_weight_that_is_tied_to_an_embedding():
    def tied():
        torch.manual_seed(0)
        embedding = nn.Embedding(D, d, dtype=torch.float64)
        return embedding, LinearSphericalLoss.from_linear(embedding, "z_loss")

    (one, head), (two, twin) = tied(), tied()
    words = torch.tensor([1, 2, 2, 5])
    with head.accumulate():
        for _ in range(2):
            head(one(words), words).backward()
    for _ in range(2):
        twin(two(words), words).backward()
    torch.testing.assert_close(one.weight.grad, two.weight.grad, **TIGHT)


def test_nothing_run_or_nothing_backwards_changes_nothing():
    head = layer()
    with head.accumulate():
        pass
    with head.accumulate():
        head(*batches(1)[0])
    with head.accumulate(), torch.no_grad():
        head(*batches(1)[0])
    assert head.weight.grad is None and head.bias.grad is None


def test_a_gradient_of_something_else_leaves_no_trace():
    head = layer()
    hidden, target = batches(1)[0]
    with head.accumulate():
        torch.autograd.grad(head(hidden, target), hidden)
    assert head.weight.grad is None


def test_an_exception_leaves_nothing_half_done():
    head = layer()
    run(head, batches(1))
    before = head.weight.grad.clone()

    left = []

    def interrupted():
        with head.accumulate():
            run(head, batches())
            left.append(head(*batches(1)[0]))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with pytest.raises(RuntimeError, match="was called after it"):
        left[0].backward()
    assert torch.equal(head.weight.grad, before)
    head.zero_grad()
    with head.accumulate():  # and it can be used again
        run(head, batches())
    twin = layer()
    run(twin, batches())
    same(head, twin)


def test_inputs_that_are_written_over_after_their_backward():
    head, twin = layer(), layer()
    with head.accumulate():
        for hidden, target in batches():
            plain, t = hidden.detach(), target.clone()
            (head(plain, t) / 3).backward()
            plain.zero_()
            t.zero_()
    run(twin, batches())
    same(head, twin)


def test_what_the_statistics_are_given_may_be_written_over_after_their_backward():
    grads = []
    for over in (False, True):
        head = layer("squared_error")
        hidden, target = batches(1)[0]
        hidden, target, upstream = hidden.detach(), target[:, None], torch.ones(4, 1).double()
        with head.accumulate():
            head.accumulation.statistics_of_batch(hidden, target).c.backward(upstream)
            if over:
                for x in (hidden, target, upstream):
                    x.zero_()
        grads.append(head.weight.grad)
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("when", ["before a forward", "before a backward", "at the end"])
def test_a_weight_that_changes_inside_is_found_out(when):
    head = layer()
    hidden, target = batches(1)[0]

    def change():
        with torch.no_grad():
            head.bias.mul_(2)

    def work():
        with head.accumulate():
            loss = head(hidden, target)
            if when == "before a forward":
                change()
                head(hidden, target)
            elif when == "before a backward":
                change()
                loss.backward()
            else:
                loss.backward()
                change()

    with pytest.raises(RuntimeError, match=r"changed inside accumulate\(\).*after the context"):
        work()
    assert head.weight.grad is None


def test_what_it_refuses():
    head = layer()
    hidden, target = batches(1)[0]
    with head.accumulate():
        loss = head(hidden, target)
        with pytest.raises(RuntimeError, match="cannot be nested"), head.accumulate():
            pass
        with pytest.raises(ValueError, match="class probabilities needs the logits"):
            head(hidden, torch.rand(len(hidden), D))
    with pytest.raises(RuntimeError, match="was called after it; call backward inside"):
        loss.backward()
    refused = {
        "uses the gram engine, got engine='chunked'": {
            "options": LinearSphericalOptions(engine="chunked")
        },
        "label_smoothing needs the logits": {"label_smoothing": 0.1},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message), layer(**options).accumulate():
            pass
    with (
        pytest.raises(TypeError, match="must be spherical"),
        layer(CASES["softmax"][0]).accumulate(),
    ):
        pass
    for name in ("weight", "bias"):
        head = layer()
        nn.utils.parametrize.register_parametrization(head, name, nn.Tanh())
        with pytest.raises(RuntimeError, match=f"the {name} is computed from something else"):
            head.accumulate().__enter__()


def test_a_change_that_no_version_tells_is_found_at_the_end():
    for name in ("weight", "bias", "prior"):
        head = layer(prior=True)

        def work(head=head, name=name):
            with head.accumulate():
                run(head, batches())
                getattr(head, name).data.mul_(2)

        with pytest.raises(RuntimeError, match=r"changed inside accumulate\(\).*nothing is added"):
            work()
        assert head.weight.grad is None and head.bias.grad is None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_it_is_not_frozen_inside(name):
    head = layer()

    def work():
        with head.accumulate():
            run(head, batches())
            getattr(head, name).requires_grad_(False)

    with pytest.raises(RuntimeError, match="requires_grad of the weight or bias"):
        work()


def test_first_derivatives_only():
    head = layer()
    hidden, target = batches(1)[0]

    def dual():
        with forward_ad.dual_level():
            head(forward_ad.make_dual(hidden.detach(), hidden.detach()), target)

    tried = {
        "create_graph": lambda: head(hidden, target).backward(create_graph=True),
        "of hidden": lambda: torch.autograd.grad(head(hidden, target), hidden, create_graph=True),
        "func": lambda: torch.func.grad(lambda h: head(h, target))(hidden.detach()),
        "vmap": lambda: torch.vmap(lambda h, t: head(h[None], t[None]))(hidden.detach(), target),
        "jvp": lambda: torch.func.jvp(lambda h: head(h, target), (hidden,), (hidden,)),
        "dual numbers": dual,
    }
    with head.accumulate():
        for work in tried.values():
            with pytest.raises(RuntimeError, match=r"LinearSphericalOptions\(engine='dense'\)"):
                work()
    assert head.weight.grad is None


def test_autocast_inside(device):
    head = layer(dtype=torch.float32)
    twin = layer(dtype=torch.float32)
    data = [(hidden.detach().float(), target) for hidden, target in batches()]
    with head.accumulate(), torch.autocast(autocasts(device), torch.bfloat16):
        loss = head(data[0][0].bfloat16(), data[0][1])
        assert loss.dtype == torch.float32
        run(head, data)
    run(twin, data)
    torch.testing.assert_close(head.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-6)


def test_one_more_batch_costs_nothing_in_the_classes():
    def flops(classes, number):
        head = LinearSphericalLoss(d, classes)
        with FlopCounterMode(display=False) as counter, head.accumulate():
            for _ in range(number):
                head(torch.randn(4, d), torch.zeros(4, dtype=torch.long)).backward()
        return counter.get_total_flops()

    assert flops(500, 5) - flops(500, 1) == flops(100, 5) - flops(100, 1)
    assert flops(500, 1) > flops(100, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", "taylor_softmax"), ("options", LinearSphericalOptions(engine="gram"))],
)
def test_a_loss_or_options_that_are_replaced_inside_are_refused(name, value):
    head = LinearSphericalLoss(d, D, "z_loss")
    hidden, target = torch.randn(4, d), torch.arange(4)
    with head.accumulate():
        head(hidden, target).backward()
        setattr(head, name, value)
        with pytest.raises(RuntimeError, match="loss or the options of the layer were replaced"):
            head(hidden, target)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearSphericalLoss(d, D, "softmax"),
        lambda: LinearSphericalLoss(d, D, label_smoothing=0.1),
    ],
)
def test_what_needs_the_logits_is_told_to_leave_the_context(make):
    head = make()
    with pytest.raises((TypeError, ValueError), match="outside of this context"):
        head.accumulate().__enter__()


def test_class_probabilities_are_told_to_leave_the_context():
    head = LinearSphericalLoss(d, D)
    with head.accumulate(), pytest.raises(ValueError, match="outside of this context"):
        head(torch.randn(4, d), torch.rand(4, D).softmax(1))
