"""FactoredSGD under PyTorch's own cases for SGD and its tests for every optimizer.

The cases are read from the installed torch, so that new ones are included. Each run has a twin
under torch.optim.SGD. A twin of ordinary layers must have the same numbers to the last bit. A twin
with a dense output layer in place of the factored one must have them to 1e-10.

Some of PyTorch's tests are left out: fused and differentiable steps, which are refused; capturable
steps, which SGD does not have; tests of memory, of GPUs and of the choice of foreach.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from _torch_cases import torchs_own
from softsphere import FactoredSphericalLoss, TaylorSoftmaxLoss
from softsphere.optim import FactoredSGD

[INFO] = [x for x in torchs_own("common_optimizers").optim_db if x.optim_cls is SGD]
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    # without a rate SGD takes this one, and FactoredSGD one that depends on the classes
    CASES = {case.desc: {"lr": 1e-3} | case.kwargs for case in INFO.optim_inputs_func("cpu")}
    ERRORS = {
        error.optimizer_error_input.desc: error
        for error in INFO.optim_error_inputs_func("cpu", torch.float64)
        if error.error_on.name == "CONSTRUCTION_ERROR"
    }
OURS = [flag for flag in INFO.supported_impls if flag == "foreach"]
REFUSED = [flag for flag in INFO.supported_impls if flag not in OURS]
d, D, m = 5, 13, 4

every_case = pytest.mark.parametrize("case", CASES)
both_kinds = pytest.mark.parametrize("kind", ["ordinary", "factored"])


class Model(nn.Module):
    """A trunk and an output layer, which is factored or has logits."""

    def __init__(self, factored: bool) -> None:
        super().__init__()
        head = FactoredSphericalLoss if factored else nn.Linear
        self.trunk = nn.Linear(d, d, dtype=torch.float64)
        self.head = head(d, D, dtype=torch.float64)

    def forward(self, rows: Tensor, target: Tensor) -> Tensor:
        hidden = self.trunk(rows).tanh()
        if isinstance(self.head, FactoredSphericalLoss):
            return self.head(hidden, target)
        return TaylorSoftmaxLoss()(self.head(hidden), target)


def apart(tensors: list[Tensor]) -> list[Tensor]:
    """Those of the trunk, of W and of b, where the last may be that of [W b]."""
    *most, last = (x.to_dense() if isinstance(x, nn.Parameter) else x for x in tensors)
    return [*most, last] if last.dim() == 1 else [*most, last[:, :d], last[:, d]]


@dataclass
class Run:
    """A model and its optimizer."""

    model: Model
    optimizer: torch.optim.Optimizer

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(m, d, generator=generator, dtype=torch.float64)
        return self.model(rows, torch.randint(D, (m,), generator=generator))

    def go(self, seeds: range) -> Run:
        for seed in seeds:
            self.optimizer.zero_grad()
            self.loss(seed).backward()
            self.optimizer.step()
        return self

    def numbers(self) -> list[Tensor]:
        return [x.detach().clone() for x in apart(list(self.model.parameters()))]

    def momentum(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        kept = [state[i]["momentum_buffer"] for i in sorted(state) if state[i]]
        return apart(kept) if kept else []


Groups = Callable[[Model], Any]


def twins(kind: str, groups: Groups = nn.Module.parameters, **options: Any) -> tuple[Run, Run]:
    torch.manual_seed(0)
    mine = Model(kind == "factored")
    theirs = Model(False)
    theirs.load_state_dict(mine.state_dict())
    return (
        Run(mine, FactoredSGD(groups(mine), **copy.deepcopy(options))),
        Run(theirs, SGD(groups(theirs), **copy.deepcopy(options))),
    )


def same(mine: Run, theirs: Run) -> None:
    """Equal to the last bit, or to 1e-10 beside a factored layer."""
    factored = isinstance(mine.model.head, FactoredSphericalLoss)
    atol = 1e-10 if factored or isinstance(theirs.model.head, FactoredSphericalLoss) else 0
    torch.testing.assert_close(mine.numbers(), theirs.numbers(), rtol=0, atol=atol)
    torch.testing.assert_close(mine.momentum(), theirs.momentum(), rtol=0, atol=atol)


@pytest.mark.parametrize("flag", [None, *OURS])
@every_case
@both_kinds
def test_ten_steps_are_those_of_sgd(kind, case, flag):
    options = {**CASES[case], **({flag: True} if flag else {})}
    mine, theirs = (run.go(range(10)) for run in twins(kind, **options))
    same(mine, theirs)


PARAMETERS = {
    "scalar": lambda: torch.randn(()),
    "no numbers": lambda: torch.randn(3, 0),
    "not contiguous": lambda: torch.randn(10, 5, 2)[..., 0],
    "transposed": lambda: torch.randn(4, 3).T,
    **{
        str(dtype): lambda dtype=dtype: torch.randn(3, 2, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64)
    },
}


@pytest.mark.parametrize("flag", [None, *OURS])
@every_case
def test_parameters_of_every_kind_in_one_optimizer(case, flag):
    """With one that has no gradient among them, and more than one dtype."""
    torch.manual_seed(0)
    starts = [make() for make in PARAMETERS.values()]
    runs = []
    for method in (FactoredSGD, SGD):
        generator = torch.Generator().manual_seed(1)
        # clone() keeps strides only as far as it can.
        params = [nn.Parameter(x.clone()) for x in (*starts, torch.ones(2))]
        options = {**copy.deepcopy(CASES[case]), **({flag: True} if flag else {})}
        stepper = method(params, **options)
        for _ in range(5):
            for p in params[:-1]:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            stepper.step()
        runs.append((params, stepper.state_dict()["state"]))
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    assert not any(x.equal(y) for x, y in zip(runs[0][0], starts, strict=False) if x.numel())


def test_sparse_gradients_of_ordinary_parameters():
    options, schedulers = INFO.metadata_for_sparse
    results = []
    for method in (FactoredSGD, SGD):
        p = nn.Parameter(torch.tensor([1.5, 1.5]))
        stepper = method([p], **options)
        chain = [make(stepper) for make in schedulers]
        with torch.sparse.check_sparse_tensor_invariants():
            for i in range(20):
                # PyTorch's own test has an index twice as well.
                p.grad = torch.sparse_coo_tensor([[i % 2] * 2], [0.3, i + 0.1], (2,))
                stepper.step()
                for scheduler in chain:
                    scheduler.step()
        results.append(p)
    assert results[0].equal(results[1]) and not results[0].equal(torch.tensor([1.5, 1.5]))


@pytest.mark.parametrize("chain", range(len(INFO.scheduler_inputs)))
@both_kinds
def test_schedulers(kind, chain):
    runs = twins(kind, lr=0.5, momentum=0.5)
    rates = []
    for run in runs:
        schedulers = [make(run.optimizer) for make in INFO.scheduler_inputs[chain]]
        for step in range(12):  # some rates change at the tenth
            rates.append(run.go(range(step, step + 1)).optimizer.param_groups[0]["lr"])
            for scheduler in schedulers:
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(*[1.0] if plateau else [])
    assert rates[:12] == rates[12:] and len(set(rates)) > 1
    same(*runs)


@both_kinds
def test_a_tensor_as_the_rate_is_read_at_each_step(kind):
    runs = twins(kind, lr=torch.tensor(0.5))
    for run in runs:
        run.go(range(2)).optimizer.param_groups[0]["lr"].fill_(0.1)
        run.go(range(2, 4))
    same(*runs)


def two_groups(**above: Any) -> Groups:
    return lambda model: [
        {"params": model.trunk.parameters()},
        {"params": model.head.parameters(), **above},
    ]


def named(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters()


def named_groups(model: Model) -> list[dict[str, Any]]:
    return [{"params": model.trunk.named_parameters(), "lr": 0.3},
            {"params": model.head.named_parameters("head")}]  # fmt: skip


GROUPS = {
    "rate": two_groups(lr=0.3),
    "decay": two_groups(weight_decay=0.2),
    "momentum": two_groups(momentum=0.8, dampening=0.1, nesterov=False),
    "maximize": two_groups(maximize=True),
    "head alone": lambda model: [{"params": model.head.parameters()}],
    "one parameter": lambda model: [
        {"params": model.trunk.bias},
        {"params": model.head.parameters()},
    ],
    "named": named,
    "named groups": named_groups,
}


@pytest.mark.parametrize("groups", GROUPS)
@every_case
@both_kinds
def test_groups_have_options_of_their_own(kind, case, groups):
    # without a rate, a group of factored weights has one of its own
    mine, theirs = twins(kind, GROUPS[groups], **CASES[case])
    same(mine.go(range(3)), theirs.go(range(3)))
    names = [group.get("param_names") for group in mine.optimizer.param_groups]
    assert all(bool(x) == groups.startswith("named") for x in names)


@pytest.mark.parametrize("with_names", [False, True])
@both_kinds
def test_a_group_may_be_added_later(kind, with_names):
    def members(layer):
        return layer.named_parameters() if with_names else layer.parameters()

    runs = twins(kind, lambda model: members(model.trunk), lr=0.5, momentum=0.9)
    for run in runs:
        run.go(range(3))
        run.optimizer.add_param_group({"params": members(run.model.head), "lr": 0.2})
        run.go(range(3, 6))
    same(*runs)


def saved(state: Any) -> Any:
    """Through a file, as a checkpoint is read."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_case
@both_kinds
def test_a_saved_state_goes_on_as_if_nothing_had_happened(kind, case):
    before, _ = twins(kind, **CASES[case])
    after, _ = twins(kind, lr=1e-3)
    goes_on(before, after)


@pytest.mark.parametrize("back", [False, True])
@every_case
def test_states_of_ordinary_parameters_are_those_of_sgd(case, back):
    """A training may go on in the other optimizer. A factored weight is one parameter where the
    dense layer has two."""
    mine, theirs = twins("ordinary", **CASES[case])
    fresh_mine, fresh_theirs = twins("ordinary")
    goes_on(theirs, fresh_mine) if back else goes_on(mine, fresh_theirs)


def goes_on(before: Run, after: Run) -> None:
    state = copy.deepcopy(before.go(range(5)).optimizer.state_dict())
    after.model.load_state_dict(saved(before.model.state_dict()))
    after.optimizer.load_state_dict(saved(state))
    unchanged = before.optimizer.state_dict()["param_groups"]
    same(before.go(range(5, 9)), after.go(range(5, 9)))
    assert state["param_groups"] == unchanged


@every_case
@both_kinds
def test_nothing_is_kept_but_momentum(kind, case):
    mine, theirs = (run.go(range(2)).optimizer.state for run in twins(kind, **CASES[case]))
    assert len(theirs) in (0, 4)
    assert len(mine) == (3 if theirs and kind == "factored" else len(theirs))


@pytest.mark.parametrize("flag", [*INFO.not_og_supported_flags, "nesterov", "algorithm"])
@both_kinds
def test_states_of_older_versions_load(kind, flag):
    mine, theirs = twins(kind, lr=0.5, momentum=0.9)
    for run in (mine, theirs):
        state = run.go(range(3)).optimizer.state_dict()
        for group in state["param_groups"]:
            group.pop(flag, None)
        run.optimizer.load_state_dict(state)
        run.go(range(3, 6))
    same(mine, theirs)


@pytest.mark.parametrize("named_before", [False, True])
@both_kinds
def test_states_with_and_without_names_load(kind, named_before):
    groups = [nn.Module.parameters, named]
    before, _ = twins(kind, groups[named_before], lr=0.5, momentum=0.9)
    after, _ = twins(kind, groups[not named_before], lr=0.1, momentum=0.9)
    before.go(range(3))
    after.model.load_state_dict(before.model.state_dict())
    after.optimizer.load_state_dict(copy.deepcopy(before.optimizer.state_dict()))
    same(before.go(range(3, 6)), after.go(range(3, 6)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@every_case
@both_kinds
def test_copies_with_the_model_go_on_alone(kind, case, copied):
    mine, theirs = (run.go(range(3)) for run in twins(kind, **CASES[case]))
    mine.optimizer.zero_grad()  # a gradient of a factored weight cannot be pickled
    other = copied(mine)
    public = [{k for k in vars(x.optimizer) if not k.startswith("_")} for x in (mine, other)]
    assert public[0] == public[1]
    other.go(range(3, 6))
    same(mine, theirs)
    same(other, theirs.go(range(3, 6)))


@every_case
@both_kinds
def test_a_closure_is_called_once_with_gradients_on(kind, case):
    runs = twins(kind, **CASES[case])
    calls, losses = [], []
    for run in runs:

        def closure(run=run):
            calls.append(torch.is_grad_enabled())
            run.optimizer.zero_grad()
            loss = run.loss(len(calls) % 3)
            loss.backward()
            return loss

        losses.append([run.optimizer.step(closure).item() for _ in range(3)])
    assert calls == [True] * 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-10, abs=0)
    same(*runs)


@pytest.mark.parametrize("set_to_none", [True, False])
@every_case
@both_kinds
def test_steps_without_a_gradient_and_with_one_of_zero(kind, case, set_to_none):
    """None leaves the parameter alone; zero still decays it and follows its momentum."""
    mine, theirs = twins(kind, **CASES[case])
    for run in (mine, theirs):
        before = run.numbers()
        run.optimizer.step()
        assert not run.optimizer.state_dict()["state"]
        torch.testing.assert_close(run.numbers(), before, rtol=0, atol=0)
        run.go(range(2))
        before = run.numbers()
        run.optimizer.zero_grad(set_to_none=set_to_none)
        run.optimizer.step()
        run.optimizer.step()
        moving = {"weight_decay", "momentum"} & CASES[case].keys() and not set_to_none
        stood = [x.equal(y) for x, y in zip(run.numbers(), before, strict=True)]
        assert stood == [not moving] * len(stood)
    same(mine.go(range(2, 4)), theirs.go(range(2, 4)))


@pytest.mark.parametrize("everywhere", [False, True], ids=["one optimizer", "all optimizers"])
@both_kinds
def test_step_hooks_run_once_a_step(kind, everywhere):
    """A hook of all optimizers would else see steps of an optimizer that nobody made."""
    seen: dict[str, list[Any]] = {}
    for run in twins(kind, two_groups(lr=0.3), lr=0.5):
        mine = seen[type(run.optimizer).__name__] = []

        def note(what, run=run, mine=mine):
            return lambda stepped, *_: mine.append((what, stepped is run.optimizer))

        if everywhere:
            hooks = [
                register_optimizer_step_pre_hook(note("before")),
                register_optimizer_step_post_hook(note("after")),
            ]
        else:
            hooks = [
                run.optimizer.register_step_pre_hook(note("before")),
                run.optimizer.register_step_post_hook(note("after")),
            ]
        try:
            run.go(range(2))
        finally:
            for hook in hooks:
                hook.remove()
        run.go(range(2, 3))
    assert seen["FactoredSGD"] == seen["SGD"] == [("before", True), ("after", True)] * 2


@both_kinds
def test_state_hooks_see_and_replace_the_state(kind):
    runs = twins(kind, lr=0.5)
    for run in runs:
        calls = []
        stepper = run.optimizer
        stepper.register_state_dict_pre_hook(lambda _, calls=calls: calls.append("saving"))
        stepper.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
        stepper.register_load_state_dict_pre_hook(
            lambda _, state: {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.25}]}
        )
        stepper.register_load_state_dict_post_hook(lambda _, calls=calls: calls.append("loaded"))
        state = stepper.state_dict()
        assert state["more"] == 1
        stepper.load_state_dict(state)
        assert calls == ["saving", "loaded"] and stepper.param_groups[0]["lr"] == 0.25
        run.go(range(3))
    same(*runs)


def test_it_can_be_printed():
    mine, _ = twins("factored", lr=0.25)
    assert "lr: 0.25" in repr(mine.optimizer)


def aimed(params: Any, known: dict[int, nn.Parameter], factored: bool) -> Any:
    """The same arguments with a factored weight in the place of each parameter."""
    if params is None:
        return list(Model(factored).head.parameters())
    if isinstance(params, Tensor):
        if id(params) not in known:
            known[id(params)] = Model(factored).head.weight
        return known[id(params)]
    if isinstance(params, dict):
        return {k: aimed(x, known, factored) if k == "params" else x for k, x in params.items()}
    if isinstance(params, (list, tuple, set)):
        return type(params)(x if isinstance(x, str) else aimed(x, known, factored) for x in params)
    return params


@pytest.mark.parametrize("error", ERRORS)
@both_kinds
def test_wrong_arguments_are_refused_as_by_sgd(kind, error):
    given, wanted = ERRORS[error].optimizer_error_input, ERRORS[error].error_type
    for method in (SGD, FactoredSGD):
        params = aimed(given.params, {}, kind == "factored")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(wanted) as caught:
                method(params, **given.kwargs)
        assert isinstance(caught.value, (TypeError, ValueError, Warning))


one = nn.Parameter(torch.ones(2))
# Checks in torch.optim that its list of errors leaves out.
MORE = {
    "no parameters": lambda method: method([]),
    "an unordered set": lambda method: method([{"params": {one}}]),
    "a tensor that is computed": lambda method: method([one * 2]),
    "no tensor": lambda method: method([3]),
    "a dict": lambda method: method({"one": one}),
    "a negative weight decay": lambda method: method([one], weight_decay=-1.0),
    "Nesterov without momentum": lambda method: method([one], nesterov=True),
    "Nesterov with dampening": lambda method: method(
        [one], momentum=0.9, dampening=0.1, nesterov=True
    ),
    "a rate that is no number": lambda method: method([one], lr=None),
    "an unknown option": lambda method: method([one], amsgrad=True),
}


@pytest.mark.parametrize("what", MORE)
def test_more_is_refused_as_by_sgd(what):
    kinds = []
    for method in (SGD, FactoredSGD):
        with pytest.raises((ValueError, TypeError)) as caught:
            MORE[what](method)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


@pytest.mark.parametrize("flag", REFUSED)
@every_case
@both_kinds
def test_forms_that_it_has_not_are_refused(kind, case, flag):
    model = Model(kind == "factored")
    with pytest.raises(ValueError, match=f"{flag} must be False"):
        FactoredSGD(model.parameters(), **CASES[case], **{flag: True})
    FactoredSGD(model.parameters(), **CASES[case], **{flag: False})


METHODS = {
    "FactoredSGD": FactoredSGD,
    "with momentum": partial(FactoredSGD, momentum=0.9),
    **{f"SGD, {flag}": partial(SGD, **{flag: True}) for flag in ("foreach", "fused")},
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_given_twice_is_not_spoilt(method):
    """PyTorch warns and steps it twice. Factors cannot take two steps that were planned at once."""
    model = Model(factored=True)
    run = Run(model, METHODS[method]([model.head.weight] * 2, lr=0.5))
    before = run.numbers()
    try:
        run.go(range(1))
    except (ValueError, RuntimeError):
        torch.testing.assert_close(run.numbers(), before, rtol=0, atol=0)
    assert model.head.health().gram_drift < 1e-10


@both_kinds
def test_a_group_that_is_refused_is_not_taken(kind):
    wrong = {
        "twice": lambda model: {"params": [model.head.weight]},
        "names": lambda model: {"params": [("x", nn.Parameter(torch.ones(2)))]},
        "computed": lambda model: {"params": [torch.ones(2, requires_grad=True) * 2]},
        "none": lambda model: {"lr": 0.1},
    }
    for name, group in wrong.items():
        mine, theirs = twins(kind, lr=0.5, momentum=0.9)
        kinds = []
        for run in (mine, theirs):
            run.go(range(2))
            with pytest.raises((ValueError, TypeError, KeyError)) as caught:
                run.optimizer.add_param_group(group(run.model))
            kinds.append(caught.type)
            assert len(run.optimizer.param_groups) == 1
        assert kinds[0] is kinds[1] or name == "none"  # PyTorch's has a bare KeyError
        same(mine.go(range(2, 4)), theirs.go(range(2, 4)))


@both_kinds
def test_a_state_of_other_groups_is_refused(kind):
    mine, theirs = twins(kind, lr=0.5, momentum=0.9)
    other, _ = twins(kind, two_groups(lr=0.3), lr=0.5)
    for run in (mine, theirs):
        run.go(range(2))
        with pytest.raises(ValueError, match="parameter groups"):
            run.optimizer.load_state_dict(other.optimizer.state_dict())
        run.go(range(2, 4))
    same(mine, theirs)
