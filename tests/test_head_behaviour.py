"""The factored layer as a citizen of PyTorch: gradients, prediction, saving, errors, cost."""

from __future__ import annotations

import copy
import io
import pickle
import signal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from softsphere import FactoredSphericalLoss, SphericalLoss, losses
from softsphere.matrix import SingularStepError
from softsphere.optim import FactoredSGD

NAMES = ("squared_error", "spherical_softmax", "taylor_softmax", "z_loss", "bohning_bound")
d, D = 6, 31


def layer(name="taylor_softmax", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return FactoredSphericalLoss(d, D, name, dtype=dtype, **options)


def train(head, steps, lr=0.5, m=4, seed=1, **sgd):
    """Some steps; returns the optimizer."""
    optimizer = FactoredSGD(head.parameters(), lr=lr, **sgd)
    go_on(head, optimizer, steps, m, seed)
    return optimizer


def go_on(head, optimizer, steps, m=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        hidden = torch.randn(m, d, generator=generator, dtype=torch.float64)
        target = torch.randint(D, (m,), generator=generator)
        optimizer.zero_grad()
        head(hidden.to(head.weight.dtype), target).backward()
        optimizer.step()


def unscaled(head):
    """The gradient with respect to [W b] less its factor π, by the parameter's own."""
    G, pi = head.weight.grad.to_dense(), head.matrix.arrays.pi
    return G if pi is None else G / pi.sqrt().unsqueeze(1)


# --- gradients ---------------------------------------------------------------------------------


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
def test_autocast_and_half_inputs(dtype):
    head = layer(dtype=torch.float32)
    hidden, target = torch.randn(3, d), torch.randint(D, (3,))
    half = hidden.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
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


# --- the optimizer -----------------------------------------------------------------------------


def test_schedulers_see_an_ordinary_optimizer():
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    head(torch.randn(3, d).double(), torch.randint(D, (3,))).backward()
    optimizer.step()
    scheduler.step()
    assert 0 < optimizer.param_groups[0]["lr"] < 1


def test_clipping_equals_the_dense_one():
    counts = torch.arange(1.0, D + 1)
    head, trunk = layer(prior=counts), nn.Linear(d, d).double()
    root = head.matrix.arrays.pi.sqrt().unsqueeze(1)
    W = nn.Parameter(root * head.dense())
    other = copy.deepcopy(trunk)
    x, target = torch.randn(3, d).double(), torch.randint(D, (3,))
    head(trunk(x), target).backward()
    H = nn.functional.pad(other(x), (0, 1), value=1.0)
    criterion = SphericalLoss("taylor_softmax", prior=counts.double())
    criterion(H @ (W / root).T, target).backward()
    got = nn.utils.clip_grad_norm_([*trunk.parameters(), *head.parameters()], 0.01)
    want = nn.utils.clip_grad_norm_([*other.parameters(), W], 0.01)
    torch.testing.assert_close(got, want.double(), rtol=1e-9, atol=0)
    torch.testing.assert_close(trunk.weight.grad, other.weight.grad)
    FactoredSGD(head.parameters(), lr=2.0).step()
    torch.optim.SGD([W], lr=2.0).step()
    torch.testing.assert_close(head.dense(), (W / root).detach())


def test_another_optimizer_is_refused_in_words():
    head, trunk = layer(dtype=torch.float32), nn.Linear(d, d)
    optimizer = torch.optim.Adam([*trunk.parameters(), *head.parameters()])
    before = copy.deepcopy(trunk.state_dict()), head.dense()
    head(trunk(torch.randn(3, d)), torch.randint(D, (3,))).backward()
    with pytest.raises(TypeError, match=r"Adam.*FactoredSGD.*LinearSphericalLoss"):
        optimizer.step()
    assert torch.equal(head.dense(), before[1])
    assert all(torch.equal(x, before[0][name]) for name, x in trunk.state_dict().items())


@pytest.mark.parametrize("recipe", ["step", "unscale and clip", "unscale, clip all"])
def test_a_grad_scaler_changes_nothing(recipe):
    plain, scaled = layer(dtype=torch.float32), layer(dtype=torch.float32)
    trunks = [nn.Linear(d, d) for _ in range(2)]
    trunks[1].load_state_dict(trunks[0].state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rows, target = torch.randn(3, d), torch.randint(D, (3,))
    norms = []
    for head, trunk, used in ((plain, trunks[0], False), (scaled, trunks[1], True)):
        above = FactoredSGD(head.parameters(), lr=0.5)
        below = torch.optim.SGD(trunk.parameters(), lr=0.1)
        loss = head(trunk(rows), target)
        (scaler.scale(loss) if used else loss).backward()
        if recipe != "step":
            for optimizer in (above, below):
                if used:
                    scaler.unscale_(optimizer)
            if recipe == "unscale and clip":
                norms.append(
                    nn.utils.clip_grad_norm_([*trunk.parameters(), *head.parameters()], 0.05)
                )
            else:
                # torch's own clips what it sees, and the layer by as much
                every = [*trunk.parameters(), *head.parameters()]
                norms.append(nn.utils.clip_grad_norm_(every, 0.05))
        for optimizer in (above, below):
            if used:
                scaler.step(optimizer)
            else:
                optimizer.step()
    scaler.update()
    torch.testing.assert_close(plain.dense(), scaled.dense())
    assert not norms or norms[0] == pytest.approx(float(norms[1]), rel=1e-5)


def test_a_grad_scaler_leaves_out_a_step_that_overflows():
    head = layer(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = FactoredSGD(head.parameters(), lr=0.5)
    before = head.dense()
    rows = torch.full((3, d), torch.inf)
    scaler.scale(head(rows, torch.randint(D, (3,)))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.dense(), before)
    assert scaler.get_scale() == 512


def test_clipping_counts_no_gradient_that_was_zeroed():
    head, trunk = layer(), nn.Linear(d, d).double()
    model = nn.ModuleDict({"trunk": trunk, "head": head})
    rows, target = torch.randn(3, d).double(), torch.randint(D, (3,))
    head(trunk(rows), target).backward()
    model.zero_grad()
    trunk(rows).sum().backward()
    alone = torch.cat([p.grad.flatten() for p in trunk.parameters()]).norm()
    assert nn.utils.clip_grad_norm_(
        [*trunk.parameters(), *head.parameters()], 1e9
    ) == pytest.approx(float(alone))


@pytest.mark.parametrize("momentum", [0.5, 0.7])
def test_less_momentum_than_before_is_mended_in_time(momentum):
    """The second block shrinks by the new momentum a step, long before the old period is over."""
    torch.manual_seed(0)
    width, classes, m = 16, 400, 8
    head = FactoredSphericalLoss(width, classes, bias=False)
    optimizer = FactoredSGD(head.parameters(), lr=0.01, momentum=0.99)
    dense = nn.Parameter(head.dense().double())
    sgd = torch.optim.SGD([dense], lr=0.01, momentum=0.99)
    criterion = SphericalLoss("taylor_softmax")
    for step in range(264):
        if step == 200:
            for group in (optimizer.param_groups[0], sgd.param_groups[0]):
                group.update(lr=0.1, momentum=momentum)
        rows, target = torch.randn(m, width), torch.randint(classes, (m,))
        for each in (optimizer, sgd):
            each.zero_grad()
        head(rows, target).backward()
        criterion(rows.double() @ dense.T, target).backward()
        for each in (optimizer, sgd):
            each.step()
    assert (head.dense() - dense).norm() < 1e-5 * dense.norm()


@pytest.mark.parametrize("renewed", [0, 3])
@pytest.mark.parametrize("way", ["autocast", "medium"])
def test_reduced_precision_around_the_layer_does_not_round_it(way, renewed):
    """What is read, saved and stepped is the same; autocast would round V when it is rewritten."""
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
            with torch.autocast("cpu", torch.bfloat16, enabled=inside and way == "autocast"):
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


@pytest.mark.parametrize("copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_layer_and_optimizer_are_copied_together(copy):
    head = layer()
    optimizer = train(head, 3, momentum=0.9)
    other, again = copy((head, optimizer))
    go_on(head, optimizer, 3, 4, 5)
    go_on(other, again, 3, 4, 5)
    torch.testing.assert_close(other.dense(), head.dense(), rtol=1e-12, atol=1e-12)


def test_a_weight_changed_in_a_checkpoint_has_its_own_gram_matrix():
    head = layer()
    train(head, 3)
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    state["weight"] *= 2
    head.load_state_dict(state)
    assert head.health().gram_drift < 1e-12


def test_a_float32_checkpoint_leaves_nothing_rounded_in_a_float64_layer():
    prior = torch.rand(D) + 0.1
    narrow, wide = layer(dtype=torch.float32, prior=prior), layer(prior=prior)
    train(narrow, 5)
    wide.load_state_dict(narrow.state_dict())
    assert wide.health().gram_drift < 1e-12
    assert float(wide.matrix.arrays.pi.sum()) == pytest.approx(D, rel=1e-14)


def test_a_new_optimizer_begins_without_the_old_ones_momentum():
    head = layer()
    train(head, 3, momentum=0.9)
    dense = nn.Parameter(head.dense())
    train(head, 1, momentum=0.9, lr=0.2, seed=7)
    sgd = torch.optim.SGD([dense], lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(4, d, generator=generator, dtype=torch.float64)
    target = torch.randint(D, (4,), generator=generator)
    o = nn.functional.pad(hidden, (0, 1), value=1.0) @ dense.T
    SphericalLoss("taylor_softmax")(o, target).backward()
    sgd.step()
    torch.testing.assert_close(head.dense(), dense.detach(), rtol=1e-9, atol=1e-9)


def test_a_step_that_cannot_be_taken_changes_nothing():
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in head.matrix.arrays.state().items()}
    hidden = torch.full((2, d), torch.nan).double()
    head(hidden, torch.tensor([0, 1])).backward()
    with pytest.raises(SingularStepError, match="not finite"):
        optimizer.step()
    for name, value in head.matrix.arrays.state().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_a_usable_layer():
    """One Ctrl-C a step, at a time that moves through it."""
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=0.5, momentum=0.9)
    go_on(head, optimizer, 1)
    caught = 0
    old = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    # a process that was started in the background ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for trial in range(300):
            torch.set_grad_enabled(True)  # PyTorch's own no_grad may have been interrupted
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1.5e-5 * trial)
                go_on(head, optimizer, 1, seed=trial)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        signal.signal(signal.SIGINT, before)
        torch.set_grad_enabled(True)
    assert caught > 20
    # a step half written would be off in the first digits
    W = head.matrix.arrays.to_dense()
    torch.testing.assert_close(head.matrix.arrays.gram, W.T @ W, rtol=1e-5, atol=1e-5)
    assert head.health().inverse_drift < 1e-5


# --- prediction --------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_prediction_is_that_of_the_logits(name, prior, monkeypatch):
    """Also where the numerator is not monotone: outputs from −4 to 4, the best on either side."""
    counts = torch.arange(1.0, D + 1).double() if prior else None
    head = layer(name, prior=counts)
    head.load_state_dict({**head.to_linear().state_dict(), "weight": 2 * torch.randn(D, d)},
                         strict=False)  # fmt: skip
    criterion = SphericalLoss(name, prior=counts)
    hidden, target = torch.randn(7, d).double(), torch.randint(D, (7,))
    o = head.to_linear()(hidden)
    assert o.min() < -2
    scores = criterion.scores(o).detach()
    if losses.get(name).normalised:
        torch.testing.assert_close(head.log_prob(hidden), scores)
        some = torch.tensor([3, 0, 3, D - 1])
        torch.testing.assert_close(head.log_prob(hidden, some), scores[:, some])
    else:
        with pytest.raises(TypeError, match="not a normalised distribution"):
            head.log_prob(hidden)
    # chunks smaller than k, and not dividing D
    chunks = head.matrix.arrays.chunks
    monkeypatch.setattr(
        head.matrix.arrays, "chunks", lambda size=None, columns=slice(None): chunks(4, columns)
    )
    best = head.topk(hidden, 9)
    want = scores.topk(9, dim=1)
    torch.testing.assert_close(best.values, want.values)
    assert torch.equal(best.indices, want.indices)
    assert torch.equal(head.predict(hidden), scores.argmax(1))
    above = (scores > scores.gather(1, target.unsqueeze(1))).sum(1) + 1
    assert torch.equal(head.rank(hidden, target), above)


# --- saving, moving, copying -------------------------------------------------------------------


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
@pytest.mark.parametrize("prior", [False, True])
def test_saving_and_loading_goes_on_exactly(sgd, prior):
    counts = torch.arange(1.0, D + 1) if prior else None
    head = layer(prior=counts)
    optimizer = train(head, 30, **sgd)
    weight = head.to_linear().weight
    buffer = io.BytesIO()
    torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    torch.testing.assert_close(state["head"]["weight"], weight, rtol=1e-12, atol=1e-12)
    other = FactoredSphericalLoss(d, D, prior=counts, dtype=torch.float64)
    resumed = FactoredSGD(other.parameters(), lr=0.5, **sgd)
    other.load_state_dict(state["head"])
    resumed.load_state_dict(state["optimizer"])
    go_on(head, optimizer, 20, seed=5)
    go_on(other, resumed, 20, seed=5)
    for name, value in head.matrix.arrays.state().items():
        assert torch.equal(value, other.matrix.arrays.state()[name]), name


def test_state_of_a_linear_layer_loads_and_exports():
    linear = nn.Linear(d, D).double()
    head = layer()
    train(head, 3, momentum=0.9)
    assert head.load_state_dict(linear.state_dict())
    torch.testing.assert_close(head.dense()[:, :d], linear.weight.detach())
    torch.testing.assert_close(head.dense()[:, d], linear.bias.detach())
    back = head.to_linear()
    torch.testing.assert_close(back.weight, linear.weight)
    nn.Linear(d, D).load_state_dict(head.state_dict(), strict=False)
    assert set(linear.state_dict()) <= set(head.state_dict())


def test_wrong_states_are_refused_as_pytorch_does():
    head = layer()
    before = head.dense()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head.load_state_dict(nn.Linear(d + 1, D).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        head.load_state_dict({"weight": torch.zeros(D, d)})
    assert torch.equal(head.dense(), before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        head.load_state_dict({**nn.Linear(d, D).state_dict(), "nonsense": torch.zeros(1)})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(how):
    model = nn.Sequential(nn.Linear(d, d).double(), layer())
    train(model[1], 5, momentum=0.9)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    before = model[1].dense()
    torch.testing.assert_close(other[1].dense(), before)
    train(other[1], 3)
    assert torch.equal(model[1].dense(), before)
    assert not torch.equal(other[1].dense(), before)


@pytest.mark.parametrize("begin", [torch.float32, torch.float64])
def test_nothing_stays_rounded_to_float32_in_a_float64_layer(begin):
    head = layer(dtype=begin, prior=torch.rand(D) + 0.1)
    if begin == torch.float32:
        train(head, 5)
        head.double()
    assert float(head.matrix.arrays.pi.sum()) == pytest.approx(D, rel=1e-14)
    assert head.health().gram_drift < 1e-13


def test_moves_between_dtypes_keep_the_matrix_and_its_double_state():
    head = layer(dtype=torch.float32)
    train(head, 5)
    before = head.dense()
    head.double()
    assert head.weight.dtype == torch.float64
    torch.testing.assert_close(head.dense(), before.double())
    train(head, 2)
    head.float()
    assert head.weight.dtype == torch.float32
    assert head.matrix.arrays.U.dtype == torch.float64
    train(head, 2)
    for half in (nn.Sequential(head).half, lambda: nn.Sequential(head).to(torch.bfloat16)):
        with pytest.raises(TypeError, match=r"float32 or float64.*autocast"):
            half()
    assert head.weight.dtype == torch.float32
    train(head, 2)


def test_sharing_between_processes_is_refused():
    with pytest.raises(TypeError, match="cannot be shared between processes"):
        layer().share_memory()


# --- wrong arguments ---------------------------------------------------------------------------

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
    "module": (lambda h: FactoredSGD(h, lr=0.1), r"\.parameters\(\)"),
    "modules": (lambda h: FactoredSGD([h], lr=0.1), "Tensors"),
    "no params": (lambda h: FactoredSGD([{"lr": 0.1}]), "params"),
    "lr": (lambda h: FactoredSGD(h.parameters(), lr=-1.0), "learning rate"),
    "large lr": (lambda h: FactoredSGD(h.parameters(), lr=1e30), "learning rate"),
    "lr of two": (lambda h: FactoredSGD(h.parameters(), lr=torch.tensor([0.1, 0.1])), "1-element"),
    "dampening": (lambda h: FactoredSGD(h.parameters(), dampening=float("nan")), "dampening"),
    "nesterov": (
        lambda h: FactoredSGD(h.parameters(), lr=1.0, nesterov=True),
        "Nesterov momentum requires",
    ),
    "differentiable": (lambda h: FactoredSGD(h.parameters(), differentiable=True), "differentiab"),
    "algorithm": (
        lambda h: FactoredSGD([{"params": h.parameters(), "algorithm": "adam"}]),
        "sgd, adamw",
    ),
    "adamw": (
        lambda h: FactoredSGD([{"params": h.parameters(), "algorithm": "adamw"}]),
        "cannot be stepped by AdamW",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    call, words = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=words):
        call(layer(dtype=torch.float32))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("prior", torch.ones(D + 1), "prior"),
        ("prior", -torch.ones(D), "prior must be positive"),
        ("weight", torch.zeros(D, d + 1), "size mismatch"),
        ("bias", None, "bias"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key, value, words):
    head = layer(prior=torch.rand(D) + 0.1)
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    train(head, 3)
    before = head.dense()
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(RuntimeError, match=words):
        head.load_state_dict(state)
    assert torch.equal(head.dense(), before)


def test_the_gradient_by_hidden_alone_leaves_the_weights_alone():
    head, hidden = layer(), torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    loss = head(hidden, torch.tensor([0, 1, 1]))
    (by_hidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert head.weight.grad is None
    loss.backward()
    assert head.weight.grad is not None
    torch.testing.assert_close(hidden.grad, by_hidden)


# --- cost --------------------------------------------------------------------------------------


def flops(num_classes, m, name, **sgd):
    """Of a step; mending, which is rare and has a cost of its own, is left out."""
    head = FactoredSphericalLoss(16, num_classes, name)
    optimizer = FactoredSGD(head.parameters(), lr=0.01, **sgd)
    head.matrix.watch.after_step = lambda *_: None
    hidden, target = torch.randn(m, 16, requires_grad=True), torch.randint(num_classes, (m,))
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            optimizer.zero_grad()
            head(hidden, target).backward()
            optimizer.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_nothing_in_classes(name, m, sgd):
    few, many = flops(100, m, name, **sgd), flops(50_000, m, name, **sgd)
    assert few == many > 0


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_mending_costs_nothing_in_classes(sgd):
    """Sixty steps of the loss that wears U out fastest, all that mends it counted."""
    spent = []
    for num_classes in (2_000, 100_000):
        torch.manual_seed(0)
        head = FactoredSphericalLoss(16, num_classes, "squared_error", dtype=torch.float64)
        optimizer = FactoredSGD(head.parameters(), lr=0.05, **sgd)
        hidden = torch.randn(60, 8, 16, dtype=torch.float64, requires_grad=True)
        head.health()  # Q is made
        with FlopCounterMode(display=False) as counter:
            for rows in hidden:
                optimizer.zero_grad()
                head(rows, torch.randint(2_000, (8,))).backward()
                optimizer.step()
        assert head.health(0).renewed > 1
        spent.append(counter.get_total_flops())
    assert spent[1] == pytest.approx(spent[0], rel=0.05)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation made anew."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().size()
            and not (name.endswith("_.default") or func.is_view)
        ):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_has_a_class_dimension():
    classes, m = 20_000, 8
    head = FactoredSphericalLoss(16, classes)
    optimizer = FactoredSGD(head.parameters(), lr=0.01)
    hidden, target = torch.randn(m, 16, requires_grad=True), torch.randint(classes, (m,))
    head.health()  # Q is made
    with Largest() as largest:
        head(hidden, target).backward()
        optimizer.step()
    assert 0 < largest.numel < classes / 10


# Rates at which the losses train, on the edge of what is stable for the squared error.
RATES = {
    "squared_error": 0.05,
    "spherical_softmax": 0.5,
    "taylor_softmax": 0.5,
    "z_loss": 0.5,
    "bohning_bound": 0.05,
    "bouchard_bound": 0.02,
}
WITH_MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}


@pytest.mark.parametrize("sgd", [{}, WITH_MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("name", RATES)
def test_float32_stays_as_near_as_the_dense_layer_over_many_steps(name, sgd):
    """A thousand steps here; ten thousand in the slow test below."""
    factored, dense = drift(name, 1_000, sgd)
    assert factored <= 5 * dense


@pytest.mark.slow
@pytest.mark.parametrize("sgd", [{}, WITH_MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("name", RATES)
def test_float32_stays_as_near_as_the_dense_layer_over_10_000_steps(name, sgd):
    factored, dense = drift(name, 10_000, sgd)
    assert factored <= 5 * dense


def drift(name, steps, sgd):
    """Relative error of W in float32, factored and dense, against a dense float64 run."""
    torch.manual_seed(0)
    classes, width, m = 200, 16, 8
    head = FactoredSphericalLoss(width, classes, name, bias=False)
    criterion = SphericalLoss(name)
    lr = RATES[name] * (1 - sgd.get("momentum", 0.0))
    exact = nn.Parameter(head.dense().double())
    plain = nn.Parameter(head.dense())
    optimizers = [
        FactoredSGD(head.parameters(), lr=lr, **sgd),
        torch.optim.SGD([exact], lr=lr, **sgd),
        torch.optim.SGD([plain], lr=lr, **sgd),
    ]
    scale = torch.logspace(0.3, -0.7, width)
    mixing = torch.randn(width, classes) / width**0.5
    for _ in range(steps):
        hidden = torch.randn(m, width) * scale
        target = (hidden @ mixing).argmax(1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        head(hidden, target).backward()
        criterion(hidden.double() @ exact.T, target).backward()
        criterion(hidden @ plain.T, target).backward()
        for optimizer in optimizers:
            optimizer.step()
    exact, plain = exact.detach(), plain.detach()
    size = exact.norm()
    return float((head.dense() - exact).norm() / size), float((plain - exact).norm() / size)
