"""FactoredSGD, and PyTorch's own tools around a step of a factored layer."""

from __future__ import annotations

import copy
import pickle
import signal

import pytest
import torch
from torch import nn

from _devices import check_repeated
from _factored import D, d, go_on, layer, train
from _systems import posix
from softsphere import (
    FactoredSphericalLoss,
    SphericalLoss,
)
from softsphere.matrix import SingularStepError
from softsphere.optim import FactoredSGD


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
                # PyTorch's own function clips everything together.
                every = [*trunk.parameters(), *head.parameters()]
                norms.append(nn.utils.clip_grad_norm_(every, 0.05))
        for optimizer in (above, below):
            if used:
                scaler.step(optimizer)
            else:
                optimizer.step()
    scaler.update()
    torch.testing.assert_close(plain.dense(), scaled.dense())
    assert not norms or float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5)


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
    norm = nn.utils.clip_grad_norm_([*trunk.parameters(), *head.parameters()], 1e9)
    assert float(norm) == pytest.approx(float(alone))


@pytest.mark.parametrize("momentum", [0.5, 0.7])
def test_less_momentum_than_before_is_mended_in_time(momentum):
    """The second block shrinks with the new momentum, long before the old period is over."""
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


@pytest.mark.parametrize("copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_layer_and_optimizer_are_copied_together(copy):
    head = layer()
    optimizer = train(head, 3, momentum=0.9)
    other, again = copy((head, optimizer))
    go_on(head, optimizer, 3, 4, 5)
    go_on(other, again, 3, 4, 5)
    torch.testing.assert_close(other.dense(), head.dense(), rtol=1e-12, atol=1e-12)


def test_heads_that_go_on_from_one_state_leave_it_as_it_was():
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=0.5, momentum=0.9)
    go_on(head, optimizer, 3)
    state, weights = optimizer.state_dict(), copy.deepcopy(head.state_dict())
    before = copy.deepcopy(state)
    ends = []
    for _ in range(2):
        other = layer()
        other.load_state_dict(weights)
        resumed = FactoredSGD(other.parameters(), lr=0.5, momentum=0.9)
        resumed.load_state_dict(state)
        go_on(other, resumed, 3, seed=5)
        ends.append(other.dense())
    torch.testing.assert_close(state["state"], before["state"], rtol=0, atol=0)
    check_repeated(*ends)
    go_on(head, optimizer, 3, seed=5)
    torch.testing.assert_close(head.dense(), ends[0])


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


@posix
@pytest.mark.once("an interrupt may meet the mode that puts the tensors of a test on a device")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_a_usable_layer():
    """There is one Ctrl-C in each step, every time a little later."""
    head = layer()
    optimizer = FactoredSGD(head.parameters(), lr=0.5, momentum=0.9)
    go_on(head, optimizer, 1)
    caught = 0
    old = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
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
        torch.set_grad_enabled(True)
    assert caught > 20
    # Half a step would be wrong in the first digits.
    W = head.matrix.arrays.to_dense()
    torch.testing.assert_close(head.matrix.arrays.gram, W.T @ W, rtol=1e-5, atol=1e-5)
    assert head.health().inverse_drift < 1e-5


WRONG = {
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
        "must be 'sgd' or 'adamw'",
    ),
    "adamw": (
        lambda h: FactoredSGD([{"params": h.parameters(), "algorithm": "adamw"}]),
        "cannot be stepped by AdamW",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    call, words = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=words):
        call(layer(dtype=torch.float32))


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_ordinary_parameters_are_stepped_as_by_an_optimizer_with_a_constructor(
    algorithm, monkeypatch
):
    """It knows, above all, what the constructor says of steps that are captured or not."""
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[algorithm]
    stepped, plain = [], kind.step.__wrapped__ if hasattr(kind.step, "hooked") else kind.step
    monkeypatch.setattr(kind, "step", lambda self: stepped.append(self) or plain(self))
    trunk, head = nn.Linear(d, d).double(), layer()
    groups = [
        {"params": head.parameters()},
        {"params": trunk.parameters(), "algorithm": algorithm, "lr": 1e-3},
    ]
    optimizer = FactoredSGD(groups, lr=0.1, capturable=True)
    head(trunk(torch.randn(3, d).double()), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    (inner,) = stepped
    made = {name: x for name, x in vars(kind(trunk.parameters(), lr=1e-3)).items() if x is True}
    assert made and made.items() <= vars(inner).items()
