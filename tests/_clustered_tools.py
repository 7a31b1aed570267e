"""Tools of PyTorch on a clustered layer, and the plain operations that it is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from _clustered import COUNTS, MIXED, D, d, rows
from softsphere import ClusteredLoss
from softsphere.matrix import FactoredTensor

BATCHES = 4


class Plain(nn.Module):
    """The same distribution from the logits of all classes, with parameters of the same names.

    Beside factored leaves, the parameter `weight` is diag(√π) [W b] as an ordinary tensor.
    """

    def __init__(self, head: ClusteredLoss) -> None:
        super().__init__()
        self.root, self.project = copy.deepcopy(head.root), copy.deepcopy(head.project)
        self.weight, self.bias = copy.deepcopy(head.weight), copy.deepcopy(head.bias)
        self.register_buffer("scale", None)
        if isinstance(self.weight, FactoredTensor):
            self.weight = nn.Parameter(self.weight.to_dense())
            self.scale = head.prior.sqrt().unsqueeze(1)
        self.S = int((MIXED < 0).sum())
        self.register_buffer("leaf_cluster", MIXED[MIXED >= 0].sort().values)
        order = MIXED.argsort(stable=True)
        self.register_buffer("position", order.argsort())
        self.register_buffer("log_pi", COUNTS[order[self.S :]].double().log())

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        root = F.log_softmax(self.root(hidden), -1)
        z = hidden if self.project is None else self.project(hidden)
        W, b = self.weight, self.bias
        if self.scale is not None:
            W, b = (self.weight / self.scale).split([d, 1], 1)
            b = b.squeeze(1)
        o = F.linear(z, W, b)
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


@dataclass(frozen=True)
class Tool:
    """One tool.

    use: trains a model with it.
    refusal: the error of factored leaves and words of it; None if they can do it.
    """

    use: Callable[[Model], None]
    refusal: tuple[type[Exception], str] | None = None


def _by(make: Callable[..., torch.optim.Optimizer], **options) -> Callable[[Model], None]:
    return lambda model: steps(model, make(model.parameters(), **options))


def _zeros_kept(model: Model) -> None:
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1), set_to_none=False)


def _clipped(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, target in batches():
        optimizer.zero_grad()
        model(x, target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def _accumulated(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
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


def _frozen_leaves(model: Model) -> None:
    model.head.weight.requires_grad_(False)
    steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))


def _saved_between(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        steps(model, optimizer)
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()})


def _moved_between(model: Model) -> None:
    x, target = batches()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x, target).backward()
    model.to(torch.float64)  # the gradient stays that of the weight
    optimizer.step()
    steps(model, optimizer)


def _penalised(model: Model) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, target in batches():
        optimizer.zero_grad()
        (model(x, target) + 0.1 * model.head.weight.norm() ** 2).backward()
        optimizer.step()


def _pruned(model: Model) -> None:
    nn.utils.prune.l1_unstructured(model.head, "weight", 0.5)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.5))
    nn.utils.prune.remove(model.head, "weight")


def _halved(model: Model) -> None:
    model.head.bfloat16()
    model.head.double()


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


_ADAPTIVE = TypeError, "keeps numbers for each (weight|entry)"

TOOLS: dict[str, Tool] = {
    "SGD": Tool(_by(torch.optim.SGD, lr=0.5)),
    "SGD, one by one, with decay": Tool(
        _by(torch.optim.SGD, lr=0.5, weight_decay=0.1, foreach=False)
    ),
    "SGD, fused, with decay": Tool(_by(torch.optim.SGD, lr=0.5, weight_decay=0.1, fused=True)),
    "SGD with momentum and decay": Tool(
        _by(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        (TypeError, "torch.optim.SGD cannot step a factored weight: the momentum"),
    ),
    "Adam, one by one": Tool(_by(torch.optim.Adam, lr=0.01, foreach=False), _ADAPTIVE),
    "AdamW, fused": Tool(_by(torch.optim.AdamW, lr=0.01, fused=True), _ADAPTIVE),
    "Adagrad": Tool(_by(torch.optim.Adagrad, lr=0.1), _ADAPTIVE),
    "gradients that stay zeros": Tool(_zeros_kept),
    "clip_grad_norm_": Tool(_clipped),
    "accumulated": Tool(_accumulated),
    "AveragedModel": Tool(_averaged),
    "deepcopy between steps": Tool(_copied_between),
    "saved and loaded between steps": Tool(_saved_between),
    "moved to another dtype and back": Tool(_moved_between),
    "checkpoint": Tool(_checkpointed),
    "a frozen root": Tool(_frozen_root),
    "frozen leaves": Tool(_frozen_leaves),
    "a hook on the gradient": Tool(_hooked),
    "a penalty on the norm": Tool(_penalised),
    "functional_call": Tool(
        _called_by_function, (TypeError, "aten.sub is not possible on a factored weight")
    ),
    "weight_norm": Tool(_parametrized, (TypeError, "factored weight")),
    "pruning": Tool(_pruned, (TypeError, "[Mm]asks and pruning")),
    "half precision": Tool(_halved, (TypeError, "must be float32 or float64")),
}
