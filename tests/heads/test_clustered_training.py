"""What users do to a clustered layer with PyTorch's tools gives the numbers of plain operations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from _clustered import COUNTS, MIXED, D, d, layer, rows
from softsphere import ClusteredLoss

BATCHES = 4


class Plain(nn.Module):
    """The same distribution from the logits of all classes, with parameters of the same names."""

    def __init__(self, head: ClusteredLoss) -> None:
        super().__init__()
        self.root, self.project = copy.deepcopy(head.root), copy.deepcopy(head.project)
        self.weight, self.bias = copy.deepcopy(head.weight), copy.deepcopy(head.bias)
        self.S = int((MIXED < 0).sum())
        self.register_buffer("leaf_cluster", MIXED[MIXED >= 0].sort().values)
        order = MIXED.argsort(stable=True)
        self.register_buffer("position", order.argsort())
        self.register_buffer("log_pi", COUNTS[order[self.S :]].double().log())

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        root = F.log_softmax(self.root(hidden), -1)
        z = hidden if self.project is None else self.project(hidden)
        o = F.linear(z, self.weight, self.bias)
        score = torch.log(1 + o + o * o / 2) + self.log_pi
        parts = [root[:, : self.S]]
        for c in range(int(MIXED.max()) + 1):
            own = self.leaf_cluster == c
            share = F.log_softmax(score[:, own], -1)
            parts.append(share + root[:, self.S + c].unsqueeze(1))
        return F.nll_loss(torch.cat(parts, 1), self.position[target])


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.trunk = nn.Linear(d, d, dtype=torch.float64)
        self.head = head

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.head(self.trunk(x), target)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    # the third batch has no target in a cluster
    targets = [torch.randint(D, (9,), generator=generator) for _ in range(BATCHES)]
    targets[2] = (MIXED < 0).nonzero()[:3].squeeze(1).repeat(3)
    return [(rows(9, seed=20 + i), target) for i, target in enumerate(targets)]


def steps(model: Model, optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
    for x, target in batches():
        optimizer.zero_grad(set_to_none=set_to_none)
        model(x, target).backward()
        optimizer.step()


def _by(make: Callable[..., torch.optim.Optimizer], **options) -> Callable[[Model], None]:
    return lambda model: steps(model, make(model.parameters(), **options))


def _zeros_kept(model: Model) -> None:
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), set_to_none=False)


def _clipped(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, target in batches():
        optimizer.zero_grad()
        model(x, target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def _accumulated(model: Model) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x, target in batches():
        (model(x, target) / BATCHES).backward()
    optimizer.step()


def _averaged(model: Model) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, target in batches():
        optimizer.zero_grad()
        model(x, target).backward()
        optimizer.step()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())


def _copied_between(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, target = batches()[0]
    model(x, target).backward()
    optimizer.step()
    other = copy.deepcopy(model)
    steps(other, torch.optim.SGD(other.parameters(), lr=0.5))
    model.load_state_dict(other.state_dict())


def _checkpointed(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, target in batches():
        optimizer.zero_grad()
        checkpoint(model, x, target, use_reentrant=False).backward()
        optimizer.step()


def _frozen_root(model: Model) -> None:
    model.head.root.requires_grad_(False)
    steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))


def _hooked(model: Model) -> None:
    model.head.weight.register_hook(lambda grad: 2 * grad)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.5))


def _called_by_function(model: Model) -> None:
    parameters = {name: x.detach().clone() for name, x in model.named_parameters()}
    for x, target in batches():
        leaves = {name: x.detach().requires_grad_() for name, x in parameters.items()}
        loss = torch.func.functional_call(model, leaves, (x, target))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        parameters = {n: x - 0.5 * g for (n, x), g in zip(leaves.items(), grads, strict=True)}
    model.load_state_dict(parameters, strict=False)


def _parametrized(model: Model) -> None:
    nn.utils.parametrizations.weight_norm(model.head)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.5))
    nn.utils.parametrize.remove_parametrizations(model.head, "weight")


TOOLS: dict[str, Callable[[Model], None]] = {
    "SGD": _by(torch.optim.SGD, lr=0.5),
    "SGD with momentum and decay": _by(
        torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
    "Adam, one by one": _by(torch.optim.Adam, lr=0.01, foreach=False),
    "AdamW, fused": _by(torch.optim.AdamW, lr=0.01, fused=True),
    "Adagrad": _by(torch.optim.Adagrad, lr=0.1),
    "gradients that stay zeros": _zeros_kept,
    "clip_grad_norm_": _clipped,
    "accumulated": _accumulated,
    "AveragedModel": _averaged,
    "deepcopy between steps": _copied_between,
    "checkpoint": _checkpointed,
    "a frozen root": _frozen_root,
    "a hook on the gradient": _hooked,
    "functional_call": _called_by_function,
    "weight_norm": _parametrized,
}


@pytest.mark.parametrize("options", [{}, {"engine": "gram"}, {"leaf_features": 3}], ids=str)
@pytest.mark.parametrize("name", TOOLS)
def test_numbers_are_those_of_plain_operations(name, options):
    head = layer(MIXED, **options)
    models = Model(head), Model(Plain(head))
    for model in models:
        TOOLS[name](model)
    ours, plain = (dict(model.named_parameters()) for model in models)
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(
            ours[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


# these optimizers make sparse tensors without saying whether to check them
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad],
    ids=["SGD", "SparseAdam", "Adagrad"],
)
def test_sparse_gradients_train_with_the_optimizers_that_take_them(make):
    head = layer(MIXED, sparse=True)
    models = Model(head), Model(Plain(head))
    for model in models:
        sparse = model is models[0]
        rest = [*model.trunk.parameters(), *model.head.root.parameters()]
        rate = torch.optim.SGD(rest, lr=0.5)
        kind = make if sparse or make is not torch.optim.SparseAdam else torch.optim.Adam
        # a small eps, since these two add it at different places
        own = kind(
            [model.head.weight], lr=0.05, **({} if make is torch.optim.SGD else {"eps": 1e-30})
        )
        x, target = batches()[0]
        model(x, target).backward()
        assert model.head.weight.grad.is_sparse == sparse
        rate.step()
        own.step()
    touched = (models[1].head.weight.grad != 0).any(1)
    found, want = models[0].head.weight, models[1].head.weight
    torch.testing.assert_close(found[touched], want[touched], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[~touched], head_before(~touched), rtol=0, atol=0)


def head_before(some: Tensor) -> Tensor:
    return layer(MIXED).weight[some]


def test_an_optimizer_that_takes_no_sparse_gradient_says_so():
    model = Model(layer(MIXED, sparse=True))
    with pytest.raises(RuntimeError, match="SparseAdam"):
        steps(model, torch.optim.Adam(model.parameters()))
