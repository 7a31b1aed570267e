"""A captured step beside the same step as it is, on a CPU by a stand-in for CUDA graphs."""

from __future__ import annotations

import copy
import pickle
import re
import signal
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from _recorded_graph import WAYS, RecordedGraph, pretend_a_gpu, step_below
from softsphere import (
    CapturedStep,
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    optim,
)
from softsphere._torch import products_have_out_dtype
from softsphere.graphs import compiled, cuda
from softsphere.matrix import SingularStepError, precision
from softsphere.matrix import step as factored_step
from softsphere.matrix.replay import Replay
from softsphere.optim import FactoredSGD
from softsphere.parallel import Agreement

pytestmark = pytest.mark.once("the stand-in for CUDA graphs is one of a CPU")
D, WIDTH, ROWS = 40, 5, 6
# on a GPU it makes no difference that a CPU would compile the step
captured = partial(CapturedStep, compile=True)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Has a CPU capture steps, or compile them."""
    return partial(WAYS[request.param], monkeypatch)


def model(momentum=0.0, loss="taylor_softmax", dtype=torch.float64, **options):
    """A trunk and a factored layer with their optimizer; the rate is a tensor."""
    torch.manual_seed(0)
    trunk = nn.Linear(WIDTH, WIDTH, dtype=dtype)
    head = FactoredSphericalLoss(WIDTH, D, loss, dtype=dtype)
    rate = torch.tensor(1.0, dtype=torch.float64)
    groups = [
        {"params": head.parameters(), "momentum": momentum, "lr": rate, **options},
        {"params": trunk.parameters(), "lr": torch.tensor(0.01), "momentum": 0.5},
    ]
    return trunk, head, FactoredSGD(groups, capturable=True)


def step_of(trunk, head, optimizer):
    def train(hidden, target):
        optimizer.zero_grad()
        loss = head(trunk(hidden), target)
        loss.backward()
        optimizer.step()
        return loss

    return train


def batch(i, dtype=torch.float64, rows=ROWS):
    generator = torch.Generator().manual_seed(i)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=dtype)
    return hidden, torch.randint(D, (rows,), generator=generator)


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i / 100))


def many(step, count):
    for i in range(count):
        step(*batch(i))


def same(one, two, tolerance=1e-9):
    for x, y in zip((one[0].weight, one[1].dense()), (two[0].weight, two[1].dense()), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 1e-3},
    "decay on the device": {"weight_decay": torch.tensor(1e-3, dtype=torch.float64)},
    "momentum": {"momentum": 0.9},
    "momentum on the device": {"momentum": torch.tensor(0.9, dtype=torch.float64)},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "maximize": {"maximize": True},
    "squared error": {"loss": "squared_error"},
}


def taken(step, *inputs):
    """The loss of a step, or None where it tells that an earlier one was left out."""
    try:
        return step(*inputs).detach()
    except SingularStepError:
        return None


def trunk_as_in(x, y):
    """Gives a model the trunk of another one, and what AdamW keeps of it."""
    for to, of in zip(x[0].parameters(), y[0].parameters(), strict=True):
        to.data.copy_(of)
        for key, value in y[2].state[of].items():
            x[2].state[to][key].copy_(value)


@pytest.mark.parametrize(
    ("name", "count"),
    [*((name, 100) for name in OPTIONS), pytest.param("plain", 1000, marks=pytest.mark.slow)],
)
def test_captured_steps_are_those_that_python_takes(name, count, way):
    """With a schedule, mending in between, and a save and a load at 60 %.

    In the long run the step at 30 % cannot be taken, and both ways tell so at the same later step.
    """
    options = {**OPTIONS[name]}
    if name in ("maximize", "squared error"):
        options["lr"] = torch.tensor(0.02, dtype=torch.float64)
    way()
    mine, plain = model(**options), model(**options)
    schedules, train = [schedule(x[2]) for x in (mine, plain)], step_of(*plain)
    step, told = captured(step_of(*mine), mine[2], *batch(0)), []
    for i in range(count):
        if count == 1000 and i == 300:
            for x in (mine, plain):
                x[2].param_groups[0]["lr"].fill_(torch.nan)
        got, want = taken(step, *batch(i)), taken(train, *batch(i))
        if got is None or want is None:
            told.append((i, got, want))
            # where Python takes the steps, the one that tells it leaves the trunk as it was
            trunk_as_in(plain, mine)
        else:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        for each in schedules:
            each.step()
        if i == count * 6 // 10:
            same(mine, plain)
            for x in (mine, plain):
                x[1].load_state_dict(copy.deepcopy(x[1].state_dict()))
    same(mine, plain)
    assert mine[1].health().renewed == plain[1].health().renewed
    assert 0 < step.captures < 40
    assert step._calls == count
    assert len(told) == (count == 1000) and all(x[1:] == (None, None) for x in told)
    if told:
        assert told[0][0] < 600 and mine[1].health().renewed > 0


def test_float32_steps_differ_by_rounding_alone(way):
    way()
    mine, plain = model(dtype=torch.float32), model(dtype=torch.float32)
    train = step_of(*plain)
    step = captured(step_of(*mine), mine[2], *batch(0, torch.float32))
    for i in range(100):
        step(*batch(i, torch.float32)), train(*batch(i, torch.float32))
    same(mine, plain, 1e-4)


@pytest.mark.parametrize("name", ["plain", "momentum", "squared error"])
def test_copies_that_last_are_those_of_the_factors(name, way):
    """Also after the factors were mended, a step was finished later, and Python took steps."""
    way()
    lr = torch.tensor(0.02 if name == "squared error" else 1.0, dtype=torch.float64)
    mine, plain = (model(dtype=torch.float32, **OPTIONS[name] | {"lr": lr}) for _ in range(2))
    train, W, lasted = step_of(*mine), mine[1].matrix.arrays, Counter()
    step = captured(train, mine[2], *batch(0, torch.float32))
    for i in range(150):
        if i == 60:
            lr.mul_(12)
        got = (train if i % 10 == 9 else step)(*batch(i, torch.float32)).detach()
        want = step_of(*plain)(*batch(i, torch.float32)).detach()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        W.check()
        for key in W.rounded.fresh & W.rounded.lasting:
            torch.testing.assert_close(W.small(key), getattr(W, key).float(), rtol=1e-6, atol=1e-7)
            lasted[key] += 1
        if i == 60:
            lr.div_(12)
    assert min(lasted["U"], lasted["centred_gram"]) > 10


def clipped(mine, hidden, target):
    trunk, head, optimizer = mine
    optimizer.zero_grad()
    loss = head(trunk(hidden), target)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([*trunk.parameters(), *head.parameters()], 0.3)
    optimizer.step()
    return loss, norm


def accumulated(mine, hidden, target):
    trunk, head, optimizer = mine
    optimizer.zero_grad()
    for half in range(2):
        (head(trunk(hidden[half::2]), target[half::2]) / 2).backward()
    optimizer.step()


def used_twice(mine, hidden, target):
    trunk, head, optimizer = mine
    optimizer.zero_grad()
    loss = head(trunk(hidden), target) + head(hidden.flip(0), target) / 2
    loss.backward()
    optimizer.step()
    return loss


def with_a_hook(mine, hidden, target):
    hook = mine[1].weight.register_hook(lambda gradient: gradient * 0.5)
    loss = step_of(*mine)(hidden, target)
    hook.remove()
    return loss


def scaled_in_place(mine, hidden, target):
    trunk, head, optimizer = mine
    optimizer.zero_grad()
    head(trunk(hidden), target).backward()
    head.weight.grad.mul_(0.5)
    optimizer.step()


def measured(mine, hidden, target):
    trunk, head, optimizer = mine
    optimizer.zero_grad()
    before = head.weight.norm()
    head(trunk(hidden), target).backward()
    found = before, head.weight.grad.norm(), head.weight[target].detach()
    optimizer.step()
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "train", [clipped, accumulated, used_twice, with_a_hook, scaled_in_place, measured]
)
def test_what_train_does_with_a_weight_or_its_gradient_is_done_in_each_step(train, momentum, way):
    way()
    rate = torch.tensor(0.2, dtype=torch.float64)
    mine, plain = (model(momentum, lr=rate) for _ in range(2))
    step = captured(partial(train, mine), mine[2], *batch(0))
    for i in range(30):
        got, want = step(*batch(i)), train(plain, *batch(i))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert step.captures
    same(mine, plain)


def twice(mine, hidden, target):
    step_of(*mine)(hidden, target)
    return step_of(*mine)(hidden, target)


def read_afterwards(mine, hidden, target):
    step_of(*mine)(hidden, target)
    return mine[1](mine[0](hidden), target)


def measured_afterwards(mine, hidden, target):
    step_of(*mine)(hidden, target)
    return mine[1].weight.norm()


def scaled_afterwards(mine, hidden, target):
    step_of(*mine)(hidden, target)
    with torch.no_grad():
        mine[1].weight.mul_(0.9)


@pytest.mark.parametrize("train", [twice, read_afterwards, measured_afterwards, scaled_afterwards])
def test_a_weight_is_not_read_after_its_step_in_a_record(train, way):
    """A step that is finished later would be missing there, and an earlier one would be lost."""
    way()
    mine, plain = model(), model()
    step = captured(partial(train, mine), mine[2], *batch(0))
    for i in range(3):
        step(*batch(i)), train(plain, *batch(i))
    with pytest.raises(RuntimeError, match="train must step a factored weight once, after every"):
        step(*batch(3))
    same(mine, plain)
    for each in (mine, plain):
        train(each, *batch(4))
    same(mine, plain)


WHOLE = {
    "saved": lambda head: head.state_dict(),
    "loaded": lambda head: head.load_state_dict(
        {"weight": torch.ones(D, WIDTH, dtype=torch.float64)}, strict=False
    ),
    "initialised": lambda head: nn.init.zeros_(head.weight),
    "added to": lambda head: head.weight.data.add_(torch.ones(D, 1, dtype=torch.float64)),
    "renewed": lambda head: head.matrix.renew_(),
    "refactorised": lambda head: head.matrix.refactorise_(),
}


@pytest.mark.parametrize("when", ["before the step", "after it"])
@pytest.mark.parametrize("what", WHOLE)
def test_a_weight_is_not_written_as_a_whole_in_a_record(what, when, way):
    way()
    mine, plain = model(), model()

    def train(model, hidden, target):
        if when == "before the step":
            WHOLE[what](model[1])
        loss = step_of(*model)(hidden, target)
        if when == "after it":
            WHOLE[what](model[1])
        return loss

    step, told = captured(partial(train, mine), mine[2], *batch(0)), []
    for i in range(8):
        try:
            step(*batch(i))
        except RuntimeError as error:
            told.append(str(error))
        else:
            train(plain, *batch(i))
        same(mine, plain)
    reasons = re.compile("written as a whole|weight once, after|reads? a value")
    assert not step.captures and all(reasons.search(words) for words in told)


@pytest.mark.parametrize("frozen", ["trunk", "head"])
def test_what_is_frozen_between_steps_is_not_stepped_until_it_is_thawed(frozen, way):
    way()
    mine, plain = model(), model()
    step = captured(step_of(*mine), mine[2], *batch(0))
    for i in range(30):
        if i % 10 == 0:
            for x in (mine, plain):
                x[frozen == "head"].requires_grad_(i != 10)
        torch.testing.assert_close(step(*batch(i)), step_of(*plain)(*batch(i)).detach())
        same(mine, plain)
    assert step.captures == 3


def test_gradients_that_are_kept_from_step_to_step_stay_where_they_are(way):
    way()
    results = []
    for is_captured in (True, False):
        trunk, head, optimizer = model()
        trunk.weight.grad = given = torch.zeros_like(trunk.weight)

        def train(hidden, target, head=head, trunk=trunk, optimizer=optimizer):
            head.zero_grad()
            trunk.zero_grad(set_to_none=False)
            head(trunk(hidden), target).backward()
            norm = trunk.weight.grad.norm()
            optimizer.step()
            return norm

        step = captured(train, optimizer, *batch(0)) if is_captured else train
        for i in range(12):
            if i == 8:
                optimizer.param_groups[1]["weight_decay"] = 0.01
            results.append(step(*batch(i)))
        assert not is_captured or step.captures == 2
        assert trunk.weight.grad is given
        results += [trunk.weight.detach(), head.dense(), given]
    half = len(results) // 2
    for got, want in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(got, want)


def test_a_step_by_python_tells_that_one_was_left_out_before_it_changes_anything(monkeypatch):
    monkeypatch.setattr(compiled, "by_inductor", lambda graph, inputs, options: graph)
    mine = model(dtype=torch.float32)
    step = captured(step_of(*mine), mine[2], *batch(0, torch.float32))
    for i in range(10):
        step(*batch(i, torch.float32))
    hidden, target = batch(10, torch.float32)
    step(hidden * torch.nan, target)
    trunk_as_in(mine, model(dtype=torch.float32))
    before = mine[1].dense()
    with pytest.raises(SingularStepError, match="was left out with those after it"):
        step_of(*mine)(hidden, target)
    assert torch.equal(mine[1].dense(), before)
    step_of(*mine)(hidden, target)
    assert mine[1].dense().isfinite().all() and not torch.equal(mine[1].dense(), before)


def test_a_weight_that_train_does_not_step_stays_as_it_is(way):
    way()
    mine, other = model(), model()

    def train(hidden, target):
        return step_of(*mine)(hidden, target) + other[1](hidden, target).detach()

    before = other[1].dense()
    step = captured(train, [mine[2], other[2]], *batch(0))
    many(step, 10)
    assert step.captures and torch.equal(other[1].dense(), before)


def test_a_refused_step_leaves_the_weight_as_it_was_and_is_told(way):
    way()
    mine = model()
    step = captured(step_of(*mine), mine[2], *batch(0))
    for i in range(10):
        step(*batch(i))
    before, trunk = mine[1].dense(), copy.deepcopy(mine[0].state_dict())
    step(batch(10)[0] * torch.inf, batch(10)[1])
    with pytest.raises(SingularStepError, match="was left out with those after it"):
        many(step, 1000)
    torch.testing.assert_close(mine[1].dense(), before)
    mine[0].load_state_dict(trunk)
    for p in mine[0].parameters():
        del mine[2].state[p]
    for i in range(10):
        assert step(*batch(i)).isfinite()
    assert not torch.equal(mine[1].dense(), before)


def test_the_steps_after_a_refused_one_are_left_out_too(way):
    way()
    mine = model()
    step, rate = captured(step_of(*mine), mine[2], *batch(0)), mine[2].param_groups[0]["lr"]
    many(step, 10)
    before = mine[1].dense()
    rate.fill_(torch.nan)
    step(*batch(10))
    rate.fill_(1.0)
    with pytest.raises(SingularStepError, match="was left out with those after it"):
        many(step, 1000)
    assert torch.equal(mine[1].dense(), before)
    many(step, 10)
    assert not torch.equal(mine[1].dense(), before)


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 1e-3}], ids=str)
def test_options_that_are_plain_numbers_are_captured_with_momentum(options, way):
    way()
    mine, plain = (model(momentum=0.9, **options) for _ in range(2))
    for each in (mine, plain):
        each[2].param_groups[0]["lr"] = 0.5
    step, train = captured(step_of(*mine), mine[2], *batch(0)), step_of(*plain)
    for i in range(20):
        torch.testing.assert_close(step(*batch(i)), train(*batch(i)).detach())
    assert step.captures
    same(mine, plain)


@pytest.mark.parametrize("by", ["products", "elimination"])
def test_a_weight_that_is_loaded_forgets_a_refused_step(way, by):
    way()
    mine = model()
    step, rate = captured(step_of(*mine), mine[2], *batch(0)), mine[2].param_groups[0]["lr"]
    saved = copy.deepcopy(mine[1].state_dict())
    many(step, 10)
    if by == "elimination":
        mine[1].matrix.watch.products, mine[1].matrix.watch.period = (0, 0), 1000
    rate.fill_(torch.nan)
    step(*batch(10))
    rate.fill_(1.0)
    mine[1].load_state_dict(saved)
    before = mine[1].dense()
    many(step, 300)
    assert not torch.equal(mine[1].dense(), before)


def test_calm_steps_are_taken_by_products_and_sudden_ones_by_elimination(monkeypatch):
    """Also where the rate is another one by the time that the step is finished."""
    pretend_a_gpu(monkeypatch)
    mine, plain = model(), model()
    step, train = CapturedStep(step_of(*mine), mine[2], *batch(0)), step_of(*plain)
    rates = [each[2].param_groups[0]["lr"].fill_(0.2) for each in (mine, plain)]
    watch = mine[1].matrix.watch
    for i in range(60):
        step(*batch(i)), train(*batch(i))
    assert watch.products[0] > 1
    for rate in rates:
        rate.fill_(12.0)
    step(*batch(60)), train(*batch(60))
    for rate in rates:
        rate.fill_(0.1)
    # reading the weight finishes the step
    assert watch.undone.any()
    same(mine, plain)
    assert not watch.undone.any()
    # as after a deviation that is larger still
    watch.products, watch.period = (0, 0), 4
    replays, graphs, replay = [], [], RecordedGraph.replay

    def counted(graph):
        replays.append(i), graphs.append(graph)
        replay(graph)

    monkeypatch.setattr(RecordedGraph, "replay", counted)
    for i in range(61, 70):
        eliminates = not watch.products[0]
        torch.testing.assert_close(step(*batch(i)), train(*batch(i)).detach())
        assert not (eliminates and i in replays)
    assert watch.products[0] and replays
    # Whether a library allows a capture of elimination is not known, so no graph has it.
    assert not any("lu_" in name for graph in graphs for name in graph.counts)
    same(mine, plain)


def test_a_step_that_was_left_undone_is_finished_with_its_own_gradient(way):
    """Where two steps of one weight are captured, for batches of two sizes."""
    way()
    mine, plain = model(), model()
    rates = [each[2].param_groups[0]["lr"].fill_(0.2) for each in (mine, plain)]
    small = captured(step_of(*mine), mine[2], *batch(0))
    large = captured(step_of(*mine), mine[2], *batch(0, rows=2 * ROWS))
    train = step_of(*plain)
    for i in range(60):
        for step, rows in ((small, ROWS), (large, 2 * ROWS)):
            step(*batch(i, rows=rows)), train(*batch(i, rows=rows))
    assert small._graph is not None and large._graph is not None
    mine[1].matrix.watch.period = 100  # no measurement finds it
    for rate in rates:
        rate.fill_(12.0)
    small(*batch(60)), train(*batch(60))
    assert mine[1].matrix.watch.undone.any()
    same(mine, plain)


def test_what_changes_a_graph_and_what_does_not(way):
    way()
    mine, plain = model(), model()
    step, train = captured(step_of(*mine), mine[2], *batch(0)), step_of(*plain)

    def both(i):
        torch.testing.assert_close(step(*batch(i)), train(*batch(i)).detach())

    for i in range(60):
        both(i)
    known = step.captures
    for each in (mine, plain):
        each[2].param_groups[0]["lr"].fill_(0.3)
    both(60)
    assert step.captures == known
    for each in (mine, plain):
        each[2].param_groups[0]["weight_decay"] = 0.01
    both(61)
    assert step.captures == known
    both(62)
    assert step.captures == known + 1
    handed, _ = mine[1].state_dict()["weight"], plain[1].state_dict()
    kept = handed.clone()
    both(63)
    both(64)
    assert torch.equal(handed, kept)
    for each in (mine, plain):
        nn.init.normal_(each[1].weight, generator=torch.Generator().manual_seed(1))
    both(65)
    both(66)
    both(67)
    same(mine, plain)


def test_padded_rows_take_no_part(way):
    way()
    mine, plain = model(), model()
    step, train = captured(step_of(*mine), mine[2], *batch(0)), step_of(*plain)
    for i in range(8):
        hidden, target = batch(i, rows=4)
        padded = (
            nn.functional.pad(hidden, (0, 0, 0, 2)),
            nn.functional.pad(target, (0, 2), value=-100),
        )
        torch.testing.assert_close(step(*padded), train(hidden, target).detach())
    same(mine, plain)


def test_the_gradient_of_hidden_for_a_trunk_outside(way):
    way()
    _, head, optimizer = model()

    step = captured(step_below(head, optimizer), optimizer, *batch(0))
    for i in range(8):
        other = copy.deepcopy(head)
        hidden = batch(i)[0].requires_grad_()
        other(hidden, batch(i)[1]).backward()
        torch.testing.assert_close(step(*batch(i))[1], hidden.grad)


# PyTorch's optimizers that can be captured, by the learning rate.
OF_PYTORCH = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True, capturable=True),
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, fused=True),
    "SGD with momentum": lambda p, lr: torch.optim.SGD(
        p, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True
    ),
}


@pytest.mark.parametrize("optimizer", OF_PYTORCH)
def test_a_step_without_a_factored_weight_and_one_of_two_optimizers(optimizer, way):
    """PyTorch's optimizer steps a layer with a dense weight, then the trunk below a factored one.

    Its rate is a tensor that changes, or a number, and an earlier state is loaded in between.
    """
    way()

    def made(factored):
        torch.manual_seed(0)
        trunk = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        kind = FactoredSphericalLoss if factored else LinearSphericalLoss
        head = kind(WIDTH, D, dtype=torch.float64)
        below = [*trunk.parameters(), *([] if factored else head.parameters())]
        rate = torch.tensor(0.01) if factored else 0.01
        all_below = OF_PYTORCH[optimizer](below, rate)
        sgd = [FactoredSGD(head.parameters(), lr=1.0, capturable=True)] if factored else []

        def train(hidden, target):
            for each in (all_below, *sgd):
                each.zero_grad()
            loss = head(trunk(hidden), target)
            loss.backward()
            for each in (all_below, *sgd):
                each.step()
            return loss

        return trunk, head, [all_below, *sgd], train

    for factored in (False, True):
        mine, plain = made(factored), made(factored)
        step = captured(mine[3], mine[2] if factored else mine[2][0], *batch(0))
        for i in range(20):
            for each in (mine, plain):
                if factored:
                    each[2][0].param_groups[0]["lr"].fill_(0.01 / (1 + i))
                if i == 5:
                    kept = copy.deepcopy(each[2][0].state_dict())
                if i == 10:
                    each[2][0].load_state_dict(copy.deepcopy(kept))
            torch.testing.assert_close(step(*batch(i)), plain[3](*batch(i)).detach())
        assert step.captures
        torch.testing.assert_close(mine[0].weight, plain[0].weight)
        torch.testing.assert_close(mine[1].weight.to_dense(), plain[1].weight.to_dense())


def test_a_step_that_was_left_out_is_told_when_it_is_asked_for(way):
    way()
    mine = model()
    step = captured(step_of(*mine), mine[2], *batch(0))
    many(step, 10)
    step.check()
    mine[1].matrix.watch.period = 1000
    step(batch(10)[0] * torch.inf, batch(10)[1])
    with pytest.raises(SingularStepError, match="was left out"):
        step.check()
    step.check()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_refused_first_step_leaves_the_weight_as_it_was(name, number, way):
    way()
    given = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in given.items()}
    mine, plain = (model(**copy.deepcopy(given)) for _ in range(2))
    before, trunk = mine[1].dense(), copy.deepcopy(mine[0].state_dict())
    option = mine[2].param_groups[0][name]
    right = option.item()
    option.fill_(number)
    assert taken(step_of(*mine), *batch(0)) is None
    torch.testing.assert_close(mine[1].dense(), before)
    option.fill_(right)
    mine[0].load_state_dict(trunk)
    for p in mine[0].parameters():
        mine[2].state.pop(p, None)
    many(step_of(*mine), 30), many(step_of(*plain), 30)
    same(mine, plain)


def test_a_refused_step_of_one_weight_leaves_the_next_one_in_order(way):
    way()
    first, second = (FactoredSphericalLoss(WIDTH, D, dtype=torch.float64) for _ in range(2))
    twin = copy.deepcopy(second)
    scale = torch.ones((), dtype=torch.float64)

    def step_of_heads(*heads):
        parameters = [p for head in heads for p in head.parameters()]
        rate = torch.tensor(0.1, dtype=torch.float64)
        optimizer = FactoredSGD(parameters, lr=rate, capturable=True)

        def train(hidden, target):
            optimizer.zero_grad()
            losses = [head(hidden, target) for head in heads]
            if len(heads) == 2:
                losses[0] = losses[0] * scale
            sum(losses).backward()
            optimizer.step()
            return losses[-1]

        return train, optimizer

    step, alone = captured(*step_of_heads(first, second), *batch(0)), step_of_heads(twin)[0]
    told = 0
    for i in range(100):
        scale.fill_(torch.nan if i == 20 else 1.0)
        told += taken(step, *batch(i)) is None
        alone(*batch(i))
        torch.testing.assert_close(second.dense(), twin.dense(), rtol=1e-9, atol=1e-9)
    assert told == 1
    assert step.captures and first.dense().isfinite().all()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("while_", ["record", "replay"])
def test_a_ctrl_c_waits_until_the_step_is_taken_as_a_whole(monkeypatch, while_):
    pretend_a_gpu(monkeypatch)
    mine, plain = model(), model()
    step, train = CapturedStep(step_of(*mine), mine[2], *batch(0)), step_of(*plain)
    many(step, 3), many(train, 3)
    run = getattr(RecordedGraph, while_)

    def interrupted(graph, *given):
        outputs = run(graph, *given)
        signal.raise_signal(signal.SIGINT)
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(RecordedGraph, while_, interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(*batch(3))
    train(*batch(3))
    for i in range(4, 8):
        torch.testing.assert_close(step(*batch(i)), train(*batch(i)).detach())
    same(mine, plain)


def test_what_a_graph_returns_holds_no_graph_of_autograd(way):
    way()
    mine = model()
    step = captured(step_of(*mine), mine[2], *batch(0))
    many(step, 6)
    assert step.captures and not step._outputs.requires_grad


def test_on_a_cpu_the_step_is_run_as_it_is():
    mine, plain = model(), model()
    step, train = CapturedStep(step_of(*mine), mine[2], *batch(0)), step_of(*plain)
    for i in range(20):
        assert torch.equal(step(*batch(i)), train(*batch(i)).detach())
    assert not step.captures


def test_a_trunk_that_adamw_steps():
    """On a CPU alone, where PyTorch's AdamW cannot be captured."""
    trunk, head, _ = model()
    adamw = {"params": trunk.parameters(), "algorithm": "adamw", "lr": torch.tensor(0.01)}
    optimizer = FactoredSGD([{"params": head.parameters(), "lr": 1.0}, adamw], capturable=True)
    step = CapturedStep(step_of(trunk, head, optimizer), optimizer, *batch(0))
    before, losses = trunk.weight.clone(), [step(*batch(0)) for _ in range(10)]
    assert losses[-1] < losses[0] and not torch.equal(trunk.weight, before)
    assert optimizer.param_groups[1]["capturable"]


def test_a_train_that_reads_a_value_is_told(monkeypatch):
    pretend_a_gpu(monkeypatch)
    mine = model()
    train = step_of(*mine)
    step = CapturedStep(lambda *x: torch.tensor(train(*x).item()), mine[2], *batch(0))
    with pytest.raises(RuntimeError, match="reads a value"):
        many(step, 5)


class Capture:
    """In place of `torch.cuda.graph`: it fails to end where the function did, or did not."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends

    def __call__(self, graph, *, stream, capture_error_mode):
        return self

    def __enter__(self):
        pass

    def __exit__(self, *raised):
        if not self.ends:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def streams(monkeypatch):
    """The streams that are entered and left again."""
    entered = []

    @contextmanager
    def stream(x):
        entered.append(x)
        try:
            yield
        finally:
            entered.remove(x)

    monkeypatch.setattr(cuda, "_side_stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    return entered


def fails(error):
    raise error


@pytest.mark.parametrize("error", [RuntimeError("not permitted when stream is capturing"), None])
def test_a_capture_that_does_not_end_in_order_says_so_and_leaves_the_stream(
    error, streams, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "graph", Capture(ends=False))
    graph = cuda.Graph(torch.device("cpu"))
    with pytest.raises(cuda.LostCaptureError, match="start a new process") as told:
        graph.record(lambda: error and fails(error))
    said = "during capture" if error is None else "when stream is capturing"
    assert said in str(told.value) and not streams


@pytest.mark.parametrize("error", [RuntimeError("of train"), TypeError("of train")])
def test_what_train_raises_in_a_capture_that_ends_in_order_is_raised(error, streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", Capture(ends=True))
    with pytest.raises(type(error), match=r"^of train$"):
        cuda.Graph(torch.device("cpu")).record(lambda: fails(error))
    assert not streams


def test_after_a_lost_capture_none_is_tried(monkeypatch):
    pretend_a_gpu(monkeypatch)
    tried = []

    def lost(self, function):
        tried.append(self)
        raise cuda.LostCaptureError("start a new process")

    monkeypatch.setattr(RecordedGraph, "record", lost)
    mine = model()
    step = CapturedStep(step_of(*mine), mine[2], *batch(0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="start a new process"):
            many(step, 5)
    assert len(tried) == 1


def test_a_graph_whose_memory_has_changed_is_not_run_again(way):
    """Also where all that it holds comes to be where it was, as after an option was set back."""
    way()
    trunk, head, optimizer = model()
    step = captured(step_of(trunk, head, optimizer), optimizer, *batch(0))
    many(step, 6)
    assert step.captures == 1
    group = optimizer.param_groups[1]
    for momentum in (0.4, 0.5):
        group["momentum"] = momentum
        step(*batch(0))
    many(step, 2)
    assert step.captures == 2


@pytest.mark.parametrize("kind", ["SGD of softsphere", "Adam", "AdamW", "RMSprop", "fused AdamW"])
def test_what_steps_on_a_cpu_without_a_step_to_capture_steps_in_a_captured_one(kind):
    """No option is needed there that is for a GPU, and PyTorch refuses it unless it is fused."""
    makers = {
        "SGD of softsphere": lambda p: FactoredSGD(p, lr=0.01),
        "Adam": torch.optim.Adam,
        "AdamW": torch.optim.AdamW,
        "RMSprop": torch.optim.RMSprop,
        "fused AdamW": lambda p: torch.optim.AdamW(p, capturable=True, fused=True),
    }
    results = []
    for captured in (False, True):
        trunk, head, _ = model()
        both = [makers[kind](trunk.parameters()), FactoredSGD(head.parameters(), lr=1.0)]

        def train(x, target, trunk=trunk, head=head, both=both):
            for each in both:
                each.zero_grad()
            loss = head(trunk(x), target)
            loss.backward()
            for each in both:
                each.step()
            return loss.detach()

        step = CapturedStep(train, both, *batch(0)) if captured else train
        results.append([step(*batch(i)) for i in range(4)] + [trunk.weight.detach()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_pytorch_does_not_step_on_a_cpu_is_said_before_anything_is_stepped():
    trunk, head, optimizer = model()
    adamw = torch.optim.AdamW(trunk.parameters(), capturable=True)
    train = step_of(trunk, head, optimizer)
    with pytest.raises(TypeError, match=r"AdamW with capturable=True.* on a CPU.*capturable=False"):
        CapturedStep(train, [optimizer, adamw], *batch(0))


def test_what_cannot_be_captured_is_said(monkeypatch):
    pretend_a_gpu(monkeypatch)
    trunk, head, optimizer = model()
    train = step_of(trunk, head, optimizer)
    with pytest.raises(TypeError, match=r"factored weight .* by FactoredSGD, got SGD"):
        CapturedStep(train, torch.optim.SGD(head.parameters(), fused=True), *batch(0))
    with pytest.raises(TypeError, match="fused=True"):
        CapturedStep(train, [optimizer, torch.optim.SGD(trunk.parameters())], *batch(0))
    with pytest.raises(TypeError, match=r"FactoredSGD.*got SparseAdam"):
        CapturedStep(train, torch.optim.SparseAdam(trunk.parameters()), *batch(0))
    with pytest.raises(TypeError, match="capturable=True"):
        CapturedStep(train, FactoredSGD(head.parameters(), lr=1.0), *batch(0))
    with pytest.raises(TypeError, match=r"optimizer must be .* got Linear"):
        CapturedStep(train, trunk, *batch(0))
    with pytest.raises(TypeError, match="train comes first and optimizer second"):
        CapturedStep(optimizer, train, *batch(0))
    with pytest.raises(TypeError, match=r"train must be a function that does a step, got str"):
        CapturedStep("train", optimizer, *batch(0))
    with pytest.raises(TypeError, match=r"example 0 must be a tensor.* got tuple"):
        CapturedStep(train, optimizer, batch(0))
    with pytest.raises(TypeError, match="compile must be True or False, got 'yes'"):
        CapturedStep(train, optimizer, *batch(0), compile="yes")
    with pytest.raises(TypeError, match="got none"):
        CapturedStep(train, [], *batch(0))
    with pytest.raises(TypeError, match="capturable=True"):
        CapturedStep(train, [optimizer, torch.optim.AdamW(trunk.parameters())], *batch(0))
    leaves = ClusteredLoss(WIDTH, D, torch.arange(D) % 3 - 1, engine="factored")
    with pytest.raises(TypeError, match="leaves of a ClusteredLoss"):
        CapturedStep(train, FactoredSGD(leaves.parameters(), lr=1.0, capturable=True), *batch(0))
    step = CapturedStep(train, optimizer, *batch(0))
    with pytest.raises(ValueError, match=r"input 0 must be \(6, 5\).*got \(4, 5\).*pad"):
        step(*batch(0, rows=4))
    with pytest.raises(ValueError, match=r"input 1 must be .*int64.*got .*int32 on cpu$"):
        step(batch(0)[0], batch(0)[1].int())
    with pytest.raises(ValueError, match=r"as many inputs as it was made with examples, 2, got 1"):
        step(batch(0)[0])
    with pytest.raises(TypeError, match=r"input 1 must be \(6,\).* got list"):
        step(batch(0)[0], batch(0)[1].tolist())
    with pytest.raises(ValueError, match=r"input 0 requires a gradient.*x\.detach\(\)"):
        step(batch(0)[0].requires_grad_(), batch(0)[1])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or saved"):
            copied(step)


def test_a_capture_by_hand_is_refused(monkeypatch):
    monkeypatch.setattr("softsphere.matrix.factored_matrix.graph_is_captured", lambda: True)
    trunk, head, optimizer = model()
    with pytest.raises(RuntimeError, match=r"softsphere\.CapturedStep"):
        step_of(trunk, head, optimizer)(*batch(0))


def test_what_reads_the_device_in_each_step_is_refused_by_its_own_words(monkeypatch):
    """It would end the capture in disorder, and the process could capture nothing afterwards."""
    monkeypatch.setattr("softsphere.heads.clustered.graph_is_captured", lambda: True)
    monkeypatch.setattr("softsphere.parallel.agreement.graph_is_captured", lambda: True)
    clustered = ClusteredLoss(WIDTH, D, torch.arange(D) % 3 - 1)
    with pytest.raises(RuntimeError, match=r"ClusteredLoss cannot be captured.* CapturedStep"):
        clustered(*batch(0))
    with pytest.raises(RuntimeError, match=r"process_group cannot be captured.* CapturedStep"):
        Agreement(None, "a loss").__enter__()


def test_options_that_a_graph_could_not_read():
    trunk, head, _ = model()
    with pytest.raises(ValueError, match=r"lr must be from 0 to 1e\+18, got nan"):
        FactoredSGD(head.parameters(), lr=torch.tensor(torch.nan), capturable=True)
    far = torch.tensor(1.0, device="meta")
    with pytest.raises(ValueError, match=r"lr must be on the device.*got meta"):
        FactoredSGD(head.parameters(), lr=far, capturable=True)
    with pytest.raises(TypeError, match="momentum may be a tensor for a group of factored"):
        FactoredSGD(trunk.parameters(), lr=0.1, momentum=torch.tensor(0.9), capturable=True)


@pytest.mark.parametrize(
    ("rows", "most"), [(WIDTH // 2, 142), (4 * WIDTH, 150)], ids=["few", "many"]
)
def test_a_captured_step_has_few_launches(monkeypatch, rows, most):
    """At most so many operations, forward, backward and step; on a GPU each is a launch or more."""
    pretend_a_gpu(monkeypatch)
    _, head, optimizer = model(dtype=torch.float32)

    def train(hidden, target):
        optimizer.zero_grad()
        loss = head(hidden, target)
        loss.backward()
        optimizer.step()
        return loss

    step = CapturedStep(train, optimizer, *batch(0, torch.float32, rows))
    counts = []
    for _ in range(6):
        step(*batch(0, torch.float32, rows))
        if step._graph:
            counts.append(step._graph.counts)
    assert counts
    for count in counts:
        launched = {name: n for name, n in count.items() if "empty" not in name}
        assert sum(launched.values()) <= most, launched


def test_the_rate_of_ordinary_parameters_is_in_the_dtype_that_fused_sgd_reads_on_a_gpu():
    """That of PyTorch reads the memory of float32 there, and any number on a CPU."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    assert optim._for_fused_sgd(rate) is rate
    assert optim._for_fused_sgd(rate.to("meta")).dtype == torch.float32


def test_the_stand_in_for_graphs_refuses_what_waits_for_a_device():
    x = torch.randn(5)
    for waiting in (lambda: x[x > 0], lambda: x.nonzero(), lambda: float(x.sum())):
        with pytest.raises(RuntimeError, match=r"which no graph can hold|by a mask"):
            RecordedGraph(x.device).record(waiting)


def test_a_record_begins_with_matrices_that_nothing_has_to_be_added_to():
    """What was summed apart in eager steps would be added whenever the record is run."""
    matrix = FactoredSphericalLoss(WIDTH, D).matrix
    matrix.arrays.matrix("U").add(torch.full((WIDTH + 1, WIDTH + 1), 1e-3))
    with Replay(matrix).recorded():
        assert matrix.arrays.matrix("U").L is None
    matrix.arrays.matrix("U").add(torch.full((WIDTH + 1, WIDTH + 1), 1e-3))
    assert Replay(matrix).before() == Replay(matrix).before()


def test_no_copy_of_a_small_array_that_is_made_while_recording_counts_afterwards():
    """It has no values before the record is run, and never if the recording fails."""
    matrix = FactoredSphericalLoss(WIDTH, D).matrix
    matrix.renew_()
    with Replay(matrix).recorded():
        matrix.arrays.rows(torch.tensor([3]))
        assert "maps" in matrix.arrays.rounded.fresh
    assert not matrix.arrays.rounded.fresh


def in_float32(monkeypatch) -> list[torch.dtype]:
    """Has steps computed in float32 where they may be; returns the dtypes of their products."""
    pretend_a_gpu(monkeypatch)
    monkeypatch.setattr(precision, "_LARGE", 1)
    monkeypatch.setattr(precision, "_NARROW", 0)
    monkeypatch.setattr(precision, "_has_parts", lambda device: True)
    used, multiply = [], factored_step.matmul

    def matmul(a, b, out=None):
        used.append(a.dtype)
        return multiply(a, b, out)

    monkeypatch.setattr(factored_step, "matmul", matmul)
    return used


@pytest.mark.parametrize("rows", [WIDTH // 2, 4 * WIDTH], ids=["few", "many"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_calm_steps_are_computed_in_float32(monkeypatch, momentum, rows):
    """They are as good as those of a CPU, with products by parts of float16."""
    models = {name: model(momentum, dtype=torch.float32) for name in ("CPU", "GPU")}
    exact = model(momentum)
    exact[0].load_state_dict(models["CPU"][0].state_dict())
    of_head = {name: x.double() for name, x in models["CPU"][1].state_dict().items()}
    exact[1].load_state_dict(of_head)
    for each in (exact, *models.values()):
        each[2].param_groups[0]["lr"].fill_(0.05)
    on_cpu, train = step_of(*models["CPU"]), step_of(*exact)
    wanted = []
    for i in range(100):
        hidden, target = batch(i, torch.float32, rows)
        wanted.append(train(hidden.double(), target).detach())
        on_cpu(hidden, target)

    used, last = in_float32(monkeypatch), set()
    steps = CapturedStep(step_of(*models["GPU"]), models["GPU"][2], *batch(0, torch.float32, rows))
    for i in range(100):
        value = steps(*batch(i, torch.float32, rows))
        torch.testing.assert_close(value.double(), wanted[i], rtol=1e-5, atol=0)
        # a record that is run again asks for no product
        last = set(used) or last
        used.clear()
    assert last == {torch.float32}
    want = exact[1].dense()
    error = {name: (each[1].dense() - want).norm() for name, each in models.items()}
    assert error["GPU"] < 3 * error["CPU"]


# a step that one factor does not solve, and one that three do but that is harsh
@pytest.mark.parametrize(("factors", "rate"), [(1, 0.5), (3, 8.0)])
def test_a_sudden_step_in_float32_is_finished_in_float64(monkeypatch, factors, rate):
    used = in_float32(monkeypatch)
    mine, plain = model(dtype=torch.float32), model(dtype=torch.float32)
    steps = CapturedStep(step_of(*mine), mine[2], *batch(0, torch.float32))
    train, watch = step_of(*plain), mine[1].matrix.watch
    rates = [each[2].param_groups[0]["lr"].fill_(0.05) for each in (mine, plain)]
    for i in range(50):
        if i == 40:
            assert watch.products[1] == 1
            watch.products, watch.period = (watch.products[0], factors), 1000
        steps(*batch(i, torch.float32))
        train(*batch(i, torch.float32))
    assert not watch.undone.any()
    for tensor in rates:
        tensor.fill_(rate)
    steps(*batch(50, torch.float32))
    assert watch.undone.any()
    used.clear()
    finished = mine[1].dense()
    assert not watch.undone.any() and set(used) == {torch.float64}
    train(*batch(50, torch.float32))
    torch.testing.assert_close(finished, plain[1].dense(), rtol=1e-4, atol=1e-6)


def test_the_inverse_gets_fewer_factors_only_after_some_measurements():
    """Every change has the step recorded again."""
    watch = FactoredSphericalLoss(WIDTH, D).matrix.watch
    taken = []
    for wanted in ((3, 2), (3, 1), (2, 1), (3, 2), (2, 2), (2, 1), (2, 1), (4, 1), (3, 0), (0, 0)):
        watch._choose_products(wanted)
        taken.append(watch.products)
    kept = [(3, 2)] * 6
    assert taken == [*kept, (2, 1), (4, 1), (3, 0), (0, 0)]


def test_float16_that_is_summed_in_float16_makes_no_float32(monkeypatch):
    pretend_a_gpu(monkeypatch)
    many = 1 << 20, 4096
    gpu = torch.device("cuda")
    monkeypatch.setattr(precision, "_multiplies_float64_slowly", lambda device: False)
    assert precision.float32_pays(gpu, *many) == products_have_out_dtype()
    monkeypatch.setattr(precision, "sums_of_float16_are_rounded", lambda: True)
    assert not precision.float32_pays(gpu, *many)
    a = torch.randn(3, 4)
    assert torch.equal(precision.matmul(a, a.mT), a @ a.mT)
