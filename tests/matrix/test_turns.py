"""Threads take turns at a factored weight: none sees half of what another one writes."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from softsphere import ClusteredLoss, FactoredSphericalLoss
from softsphere.matrix import FactoredTensor, turns
from softsphere.matrix.abstract import Kept
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.rows import Rows
from softsphere.matrix.stack_arrays import StackArrays
from softsphere.matrix.turns import turn
from softsphere.optim import FactoredSGD

pytestmark = pytest.mark.once("turns are of Python, and other threads make tensors on the CPU")

D, d = 60, 4
ROWS = torch.linspace(-1, 1, 6 * d).view(6, d)
TARGET = torch.tensor([0, 7, 7, 20, 41, 59])


def factored() -> FactoredSphericalLoss:
    return FactoredSphericalLoss(d, D, prior=torch.arange(1, D + 1.0))


def leaves() -> ClusteredLoss:
    return ClusteredLoss(d, D, torch.arange(D) % 7 - 1, engine="factored")


HEADS = {"factored": factored, "leaves": leaves}


def sgd(head, **options):
    """An optimizer of the factored weight alone: what else a layer has changes without turns."""
    return torch.optim.SGD([head.weight], lr=0.1, **options)


def momentum(head):
    return FactoredSGD([head.weight], lr=0.1, momentum=0.9)


def stepped(make):
    """What makes a step with the optimizer that `make` returns."""

    def prepare(head):
        optimizer = make(head)
        for _ in range(2):
            head(ROWS, TARGET).backward()
            optimizer.step()
            optimizer.zero_grad()
        head(ROWS, TARGET).backward()
        return optimizer.step

    return prepare


def loading(head):
    saved = head.state_dict()
    state = {name: saved[name] + 1 for name in ("weight", "bias")}
    if "assignment" in saved:
        state["assignment"] = saved["assignment"]
    return lambda: head.load_state_dict(state, strict=False)


def scaling(head):
    @torch.no_grad()
    def scale():
        head.weight.mul_(2)

    return scale


# What writes the factors: each is given a layer and returns a function that writes.
WRITES: dict[str, Callable] = {
    "SGD": stepped(sgd),
    "decay": stepped(lambda head: sgd(head, weight_decay=0.1)),
    "momentum": stepped(momentum),
    "load_state_dict": loading,
    "reset_parameters": lambda head: head.reset_parameters,
    "mul_": scaling,
    "an initialiser": lambda head: lambda: torch.nn.init.constant_(head.weight, 0.5),
}


def saved(head):
    return {name: x.clone() for name, x in head.state_dict().items()}


def gradient(head):
    hidden = ROWS.clone().requires_grad_()
    head(hidden, TARGET).backward(inputs=[hidden])
    return hidden.grad


# What reads them, whose result depends on W.
READS: dict[str, Callable] = {
    "state_dict": saved,
    "deepcopy": lambda head: saved(copy.deepcopy(head)),
    "pickle": lambda head: saved(pickle.loads(pickle.dumps(head))),
    "loss": lambda head: head(ROWS, TARGET).detach(),
    "gradient of hidden": gradient,
    "log_prob": lambda head: head.log_prob(ROWS).detach(),
    "log_prob of some": lambda head: head.log_prob(ROWS, TARGET).detach(),
    "topk": lambda head: head.topk(ROWS, 3)[0],
    "rank": lambda head: head.rank(ROWS, TARGET),
    "to_dense": lambda head: head.weight.to_dense(),
    "norm": lambda head: head.weight.detach().norm(),
    "rows": lambda head: head.weight.detach()[TARGET[:-1]],
    "product": lambda head: torch.ones(2, len(head.weight)) @ head.weight.detach(),
    "isfinite": lambda head: head.weight.isfinite().all() & (head.weight.norm() > 0),
}


PREDICTIONS = ["log_prob", "log_prob of some", "topk", "rank"]


class Lock:
    """A lock beside which something is done when it is let go for the first time."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.lock, self.depth, self.meanwhile = threading.RLock(), 0, [meanwhile]

    def __enter__(self):
        self.lock.acquire()
        self.depth += 1

    def __exit__(self, *error):
        self.depth -= 1
        free = self.depth == 0
        self.lock.release()
        if free and self.meanwhile:
            self.meanwhile.pop()()


@pytest.mark.parametrize("read", PREDICTIONS)
@pytest.mark.parametrize("head", HEADS)
def test_a_prediction_is_of_one_weight(head, read, monkeypatch):
    """Its parts would be of several if another thread could make a step between them."""
    torch.manual_seed(0)
    layer = HEADS[head]()
    take = WRITES["SGD"](layer)
    before = READS[read](layer)

    def step():
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(60)

    monkeypatch.setattr(turns._turns, "lock", Lock(step))
    assert_close(READS[read](layer), before)
    # a rank is so coarse that a step may leave it as it is
    assert read == "rank" or not torch.equal(READS[read](layer), before)


# The leaves of a clustered layer have no momentum.
CASES = [case for case in itertools.product(HEADS, WRITES) if case != ("leaves", "momentum")]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(("head", "write"), CASES)
def test_another_thread_waits_for_what_is_being_written(head, write, read, monkeypatch):
    torch.manual_seed(0)
    layer = HEADS[head]()
    take, own = WRITES[write](layer), Rows.own
    found, started, in_the_middle = [], [], []

    def reader():
        found.append(READS[read](layer))

    def with_a_reader(self):
        """V is about to be written."""
        own(self)
        if not started:
            started.append(threading.Thread(target=reader))
            started[0].start()
            started[0].join(0.03)
            in_the_middle.append(list(found))

    monkeypatch.setattr(Rows, "own", with_a_reader)
    take()
    monkeypatch.undo()
    assert in_the_middle == [[]]
    started[0].join(60)
    assert_close(found[0], READS[read](layer))


# Where a reader is met by a writer.
MEETINGS = {
    "a look for changes": [(Rows, "changed_by_others")],
    "the arrays": [
        (Rows, "__getitem__"),
        (Rows, "lend"),
        (Arrays, "small"),
        (StackArrays, "of"),
    ],
}


@pytest.mark.parametrize("read", ["state_dict", "pickle", "loss", "log_prob", "to_dense", "rows"])
@pytest.mark.parametrize("meeting", MEETINGS)
@pytest.mark.parametrize(("head", "write"), [case for case in CASES if case[1] in ("SGD", "mul_")])
def test_another_thread_waits_for_what_is_being_read(head, write, meeting, read, monkeypatch):
    torch.manual_seed(0)
    layer = HEADS[head]()
    take, done, started, in_the_middle = WRITES[write](layer), [], [], []

    def writer():
        take()
        done.append(True)

    def with_a_writer(method):
        def read(self, *args):
            if not started:
                started.append(threading.Thread(target=writer))
                started[0].start()
                started[0].join(0.03)
                in_the_middle.append(list(done))
            return method(self, *args)

        return read

    for kind, name in MEETINGS[meeting]:
        monkeypatch.setattr(kind, name, with_a_writer(getattr(kind, name)))
    READS[read](layer)
    monkeypatch.undo()
    assert in_the_middle == [[]]
    started[0].join(60)
    assert done


@pytest.mark.parametrize("read", ["weight", "momentum"])
def test_all_rows_are_read_of_one_weight(read, monkeypatch):
    torch.manual_seed(0)
    layer = factored()
    step = stepped(momentum)(layer)
    reads = {
        "weight": layer.weight.to_dense,
        "momentum": lambda: step.__self__.state_dict()["state"][0]["momentum_buffer"],
    }
    before, chunk, started = reads[read](), Kept._chunk, []

    def met(self, part, columns):
        rows = chunk(self, part, columns)
        if not started:
            started.append(threading.Thread(target=step))
            started[0].start()
        started[0].join(0.03)
        return rows

    monkeypatch.setattr("softsphere.matrix.rows._CHUNK_BYTES", 1)
    monkeypatch.setattr(Kept, "_chunk", met)
    found = reads[read]()
    monkeypatch.undo()
    started[0].join(60)
    assert_close(found, before)
    assert not torch.equal(found, reads[read]())


@pytest.mark.parametrize("optimizer", [sgd, momentum])
def test_a_layer_is_not_saved_between_the_planning_of_a_step_and_the_step(optimizer, monkeypatch):
    """To save it changes its factors, for which the step was planned."""
    torch.manual_seed(0)
    layer = factored()
    take, plan = stepped(optimizer)(layer), FactoredMatrix.plan
    alone = copy.deepcopy(layer)
    stepped_alone = optimizer(alone)
    stepped_alone.load_state_dict(take.__self__.state_dict())
    alone(ROWS, TARGET).backward()
    stepped_alone.step()
    found, started = [], []

    def planned(*args):
        made = plan(*args)
        started.append(threading.Thread(target=lambda: found.append(saved(layer))))
        started[0].start()
        started[0].join(0.03)
        assert not found
        return made

    monkeypatch.setattr(FactoredMatrix, "plan", planned)
    take()
    monkeypatch.undo()
    started[0].join(60)
    assert_close(layer.weight.to_dense(), alone.weight.to_dense())
    assert_close(found[0], saved(layer))


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_a_saved_weight_are_copied_only_where_another_thread_may_write_them(
    threads, monkeypatch
):
    layer = FactoredSphericalLoss(d, D, bias=False)
    V = layer.state_dict()["weight"]
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    (_, rows), *_ = layer.weight.matrix.arrays.chunks()
    assert (rows.data_ptr() == V.data_ptr()) == (threads == 1)


def test_a_copy_of_a_parameter_does_not_look_at_its_gradient(monkeypatch):
    """To look at it while another thread trains crashes PyTorch."""

    def looked(self):
        raise AssertionError("the gradient was looked at")

    layer = factored()
    monkeypatch.setattr(FactoredTensor, "grad", property(looked), raising=False)
    copied = copy.deepcopy(layer.weight)
    monkeypatch.undo()
    assert_close(copied.to_dense(), layer.weight.to_dense())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent():
    """As a worker of a DataLoader, made while another thread saves a layer."""
    inside, end = threading.Event(), threading.Event()

    def other():
        with turn():
            inside.set()
            end.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        lock = turn()
        os._exit(0 if lock.acquire(timeout=5) else 1)
    end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
