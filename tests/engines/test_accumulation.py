"""Accumulated over batches with one Gram matrix, gradients are those of plain accumulation."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from _cases import CASES
from _engines import SPHERICAL
from softsphere import LinearSphericalLoss, LinearSphericalOptions

d, D = 6, 123
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
SMALL_CHUNKS = LinearSphericalOptions(class_chunk=50)


def layer(loss="taylor_softmax", bias=True, prior=False, **options):
    torch.manual_seed(0)
    counts = torch.rand(D).double() + 0.2 if prior else None
    options = {"dtype": torch.float64, "options": SMALL_CHUNKS, **options}
    return LinearSphericalLoss(d, D, loss, bias, counts, **options)


def batches(number=3):
    torch.manual_seed(1)
    return [
        (torch.randn(m, d).double().requires_grad_(), torch.randint(D // 20, (m,)))
        for m in range(4, 4 + number)
    ]


def run(head, data):
    for hidden, target in data:
        (head(hidden, target) / len(data)).backward()


def same(one, two):
    for x, y in zip(one.parameters(), two.parameters(), strict=True):
        if x.grad is None or y.grad is None:
            assert x.grad is y.grad
        else:
            torch.testing.assert_close(x.grad, y.grad, **TIGHT)


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


def test_autocast_inside():
    head = layer(dtype=torch.float32)
    twin = layer(dtype=torch.float32)
    data = [(hidden.detach().float(), target) for hidden, target in batches()]
    with head.accumulate(), torch.autocast("cpu", torch.bfloat16):
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


# --- how it comes into .grad --------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Counts the tensors as large as W that are made meanwhile."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= D * d:
            self.count += not (func.is_view or func._schema.name.endswith("_"))
        return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_nothing_as_large_as_the_weight_is_made_but_its_gradient(before, transposed):
    head = layer()
    if transposed:
        head.weight = nn.Parameter(torch.randn(d, D).double().t())
    twin = copy.deepcopy(head)
    for x in (head, twin):
        if before:
            run(x, batches(1))
    with Made() as made, head.accumulate():
        run(head, batches())
    assert made.count == 1
    run(twin, batches())
    same(head, twin)


def test_hooks_see_the_sum_once():
    head, twin = layer(), layer()
    seen = []
    for name, x in head.named_parameters():
        x.register_hook(lambda g, name=name: seen.append((name, g.clone())) or 2 * g)
        x.register_post_accumulate_grad_hook(lambda x, name=name: seen.append((name, x.grad)))
    with head.accumulate():
        run(head, batches())
        assert not seen
    run(twin, batches())
    assert sorted(name for name, _ in seen) == ["bias", "bias", "weight", "weight"]
    for name, g in seen:
        x = getattr(head, name)
        by = 2 if g is x.grad else 1
        torch.testing.assert_close(g, by * getattr(twin, name).grad, **TIGHT)


def test_an_optimizer_in_a_hook_steps_once():
    def stepping(head):
        optimizers = {x: torch.optim.SGD([x], lr=0.1) for x in head.parameters()}

        def step(x):
            optimizers[x].step()
            optimizers[x].zero_grad()

        for x in head.parameters():
            x.register_post_accumulate_grad_hook(step)

    head, twin = layer(), layer()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    stepping(head)
    with head.accumulate():
        run(head, batches())
    run(twin, batches())
    optimizer.step()
    for x, y in zip(head.parameters(), twin.parameters(), strict=True):
        assert x.grad is None
        torch.testing.assert_close(x, y, **TIGHT)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_backward_for_some_only(hooked):
    head, twin = layer(), layer()
    if hooked:
        head.bias.register_hook(lambda g: None)
    hidden, target = batches(1)[0]
    of = {"bias": ["bias"], "both": ["weight", "bias"]}

    def backward(x, names):
        x(hidden, target).backward(inputs=[hidden, *(getattr(x, name) for name in names)])

    with head.accumulate():
        head(hidden, target).backward()
        if hooked:
            with pytest.raises(RuntimeError, match="without inputs="):
                backward(head, of["bias"])
        with pytest.raises(RuntimeError, match=r"autograd\.grad"):
            torch.autograd.grad(head(hidden, target), [hidden, head.weight], allow_unused=True)
        if not hooked:
            for names in of.values():
                backward(head, names)
            torch.autograd.grad(head(hidden, target), hidden)
    twin(hidden, target).backward()
    if not hooked:
        for names in of.values():
            backward(twin, names)
    same(head, twin)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_layers_with_one_weight(order):
    embedding = nn.Embedding(D, d, dtype=torch.float64)
    twin = copy.deepcopy(embedding)

    def heads(x):
        return [LinearSphericalLoss.from_linear(x, name) for name in ("z_loss", "squared_error")]

    mine, theirs = heads(embedding), heads(twin)
    stacks = [ExitStack(), ExitStack()]
    for stack, head in zip(stacks, mine, strict=True):
        stack.enter_context(head.accumulate())
    for head in (*mine, *mine[::-1]):
        run(head, batches())
    for i in order:
        stacks[i].close()
    for head in (*theirs, *theirs):
        run(head, batches())
    torch.testing.assert_close(embedding.weight.grad, twin.weight.grad, **TIGHT)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_tied_embedding_and_a_gradient_of_its_own(sparse, before):
    grads = []
    words = torch.tensor([1, 2, 2, 5])
    for inside in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(D, d, dtype=torch.float64, sparse=sparse)
        head = LinearSphericalLoss.from_linear(embedding)
        if before:
            embedding(words).pow(2).sum().backward()
        with ExitStack() as stack:
            if inside:
                stack.enter_context(head.accumulate())
            for _ in range(2):
                head(embedding(words), words).backward()
            embedding.weight.pow(2).sum().backward()
        grads.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*grads, **TIGHT)


# --- what is pending ----------------------------------------------------------------------------

PENDING = r"pending inside accumulate\(\).*after the context"
OPTIMIZERS = {
    "sgd": lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.9, foreach=False),
    "sgd, foreach": lambda x: torch.optim.SGD(x, lr=0.1, foreach=True),
    "sgd, fused": lambda x: torch.optim.SGD(x, lr=0.1, fused=True),
    "adamw": lambda x: torch.optim.AdamW(x, foreach=False),
    "adamw, foreach": lambda x: torch.optim.AdamW(x, foreach=True),
    "adamw, fused": lambda x: torch.optim.AdamW(x, fused=True),
    "adagrad": lambda x: torch.optim.Adagrad(x),
    "rmsprop": lambda x: torch.optim.RMSprop(x),
}


def over_a_trunk():
    """A trunk with gradients and a head, and all their values."""
    torch.manual_seed(0)
    trunk, head = nn.Linear(d, d, dtype=torch.float64), layer()
    trunk(torch.randn(2, d).double()).sum().backward()
    return trunk, head, [x.detach().clone() for x in (*trunk.parameters(), *head.parameters())]


@pytest.mark.parametrize("first", ["trunk", "head", "in groups"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_inside_is_refused_before_anything_has_moved(name, first):
    trunk, head, values = over_a_trunk()
    of = [[*trunk.parameters()], [*head.parameters()]]
    groups = [{"params": x} for x in of]
    optimizer = OPTIMIZERS[name](
        {"trunk": of[0] + of[1], "head": of[1] + of[0], "in groups": groups}[first]
    )
    state = str(optimizer.state_dict())
    with head.accumulate():
        run(head, batches())
        with pytest.raises(RuntimeError, match=PENDING):
            optimizer.step()
        assert str(optimizer.state_dict()) == state
    for x, was in zip(of[0] + of[1], values, strict=True):
        assert torch.equal(x, was)
    optimizer.step()
    for x, was in zip(of[0] + of[1], values, strict=True):
        assert not torch.equal(x, was)


READERS = {
    "clip_grad_norm_": lambda x: nn.utils.clip_grad_norm_(x, 1.0),
    "clip_grad_norm_, foreach": lambda x: nn.utils.clip_grad_norm_(x, 1.0, foreach=True),
    "clip_grad_value_": lambda x: nn.utils.clip_grad_value_(x, 1.0),
    "norm": lambda x: x[0].grad.norm(),
    "copy": lambda x: torch.zeros_like(x[0]).copy_(x[0].grad),
    "add": lambda x: x[0].grad + 1,
    "mul_": lambda x: x[0].grad.mul_(2),
    "add_ of a row": lambda x: x[0].grad.add_(torch.ones(d, dtype=torch.float64)),
    "index": lambda x: x[0].grad[0],
    "dtype": lambda x: x[0].grad.float(),
    "by hand": lambda x: x[0].data.add_(x[0].grad, alpha=-0.1),
    "foreach by hand": lambda x: torch._foreach_add_([x[0].data], [x[0].grad]),
    "pickle": lambda x: pickle.dumps(x[0].grad),
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_pending_gradient_raises(name):
    head = layer()
    values = [x.detach().clone() for x in head.parameters()]
    with head.accumulate():
        run(head, batches())
        with pytest.raises(RuntimeError, match=PENDING):
            READERS[name]([*head.parameters()])
    for x, was in zip(head.parameters(), values, strict=True):
        assert torch.equal(x, was)
    twin = layer()
    run(twin, batches())
    same(head, twin)


def test_a_scaler_inside_is_refused():
    trunk, head, _ = over_a_trunk()
    optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    grads = [x.grad.clone() for x in trunk.parameters()]
    with head.accumulate():
        scaler.scale(head(*batches(1)[0])).backward()
        for work in (scaler.unscale_, scaler.step):
            with pytest.raises(RuntimeError, match=PENDING):
                work(optimizer)
    for x, was in zip(trunk.parameters(), grads, strict=True):
        assert torch.equal(x.grad, was)


def test_to_look_at_a_pending_gradient_is_harmless():
    head, twin = layer(), layer()
    with head.accumulate():
        run(head, batches())
        grad = head.weight.grad
        assert "pending" in repr(grad) and "pending" in str(grad)
        assert grad.shape == (D, d) and grad.dtype == torch.float64 and grad.is_leaf
        assert "pending" in repr(grad.detach()) and "pending" in repr(grad.data)
        copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    assert all(x.weight.grad is None for x in copies)
    run(twin, batches())
    same(head, twin)
    with pytest.raises(RuntimeError, match="pending"):
        grad.add_(torch.ones_like(head.weight))  # too late


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("zero", ["none", "zeros", "foreach zeros", "module", "module zeros"])
def test_zero_grad_inside_forgets_as_it_does_outside(zero, before, again):
    def work(head):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, foreach=zero == "foreach zeros")
        run(head, batches(2))
        if "module" in zero:
            head.zero_grad(set_to_none="zeros" not in zero)
        else:
            optimizer.zero_grad(set_to_none="zeros" not in zero)
        if again:
            run(head, batches(3))

    head, twin = layer(), layer()
    for x in (head, twin):
        if before:
            run(x, batches(1))
    with head.accumulate():
        work(head)
    work(twin)
    same(head, twin)
    assert before or again or (head.weight.grad is None) == ("zeros" not in zero)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_gradient_is_forgotten_and_the_other_kept(name, again):
    head, twin, seen = layer(), layer(), []

    def work(head):
        run(head, batches(2))
        getattr(head, name).grad = None
        if again:
            run(head, batches(3))

    getattr(head, name).register_post_accumulate_grad_hook(seen.append)
    with head.accumulate():
        work(head)
    work(twin)
    same(head, twin)
    assert len(seen) == again


@pytest.mark.parametrize("raises", [False, True])
def test_a_gradient_that_was_there_is_the_one_that_is_there_after(raises):
    head, twin = layer(), layer()
    for x in (head, twin):
        run(x, batches(1))
    grads, was = [x.grad for x in head.parameters()], [x.grad.clone() for x in head.parameters()]

    def work():
        with head.accumulate():
            run(head, batches())
            if raises:
                raise KeyError

    if raises:
        with pytest.raises(KeyError):
            work()
    else:
        work()
        run(twin, batches())
    assert all(x.grad is g for x, g in zip(head.parameters(), grads, strict=True))
    same(head, twin)
    assert all(torch.equal(g, x) == raises for g, x in zip(grads, was, strict=True))


def test_a_gradient_that_is_put_there_inside_is_added_to():
    head, twin = layer(), layer()

    def work(head):
        run(head, batches(2))
        head.weight.grad = torch.ones_like(head.weight)
        head.weight.grad.add_(head.weight.detach())
        run(head, batches(3))
        head.weight.grad.add_(head.weight.detach())

    with head.accumulate():
        work(head)
    work(twin)
    same(head, twin)


def test_no_optimizer_is_watched_after_it():
    from torch.optim import optimizer

    head = layer()
    before = len(optimizer._global_optimizer_pre_hooks)
    with pytest.raises(KeyError), head.accumulate():
        raise KeyError
    assert len(optimizer._global_optimizer_pre_hooks) == before
