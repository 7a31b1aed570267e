"""Handlings of optimizers, schedules and momentum."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _registry import Run, handling, register
from _subject import LR, Subject
from softsphere.optim import FactoredSGD

SGDS = {
    "plain": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "weight decay": {"weight_decay": 0.1},
    "weight decay, foreach": {"weight_decay": 0.1, "foreach": True},
    "weight decay, fused": {"weight_decay": 0.1, "fused": True},
    "maximize": {"maximize": True, "lr": 0.01, "weight_decay": 0.1},
    "tensor rate": {"lr": torch.tensor(0.5)},
}
MOMENTA = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "momentum, maximize": {"momentum": 0.8, "maximize": True, "lr": 0.01},
}
ADAPTIVE = {
    "Adam": torch.optim.Adam,
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
}
SCHEDULES = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.5, total_steps=9, cycle_momentum=False
    ),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}
NO_ADAPTIVE = (TypeError, "FactoredSGD")


def trained(steps: int, make: Callable[[Subject], torch.optim.Optimizer]) -> Run:
    """Training for some steps with the optimizer that `make` gives a subject."""
    return lambda s: s.trained(steps, make(s))


def scheduled(schedule: Callable[..., Any]) -> Run:
    """Training with a schedule of the learning rate."""

    def run(s: Subject) -> dict[str, Tensor]:
        optimizer = s.sgd()
        rates = schedule(optimizer)
        for k in range(8):
            s.train(1, optimizer)
            rates.step(k % 3) if "Plateau" in type(rates).__name__ else rates.step()
        return s.numbers()

    return run


for name, options in SGDS.items():
    register(f"torch.optim.SGD, {name}", trained(8, lambda s, o=options: s.sgd(**o)))
    if "fused" not in name:
        register(
            f"FactoredSGD, {name}",
            trained(8, lambda s, o=options: FactoredSGD(s.model.parameters(), **{"lr": LR, **o})),
        )
for name, options in MOMENTA.items():
    register(
        f"FactoredSGD against torch.optim.SGD, {name}",
        trained(8, lambda s, o=options: s.with_momentum(**o)),
    )
    if name != "momentum, maximize":
        register(
            f"torch.optim.SGD, {name}",
            trained(2, lambda s, o=options: s.sgd(**o)),
            refusal=(TypeError, "FactoredSGD"),
        )
for name, kind in ADAPTIVE.items():
    register(name, trained(2, lambda s, k=kind: k(s.model.parameters())), refusal=NO_ADAPTIVE)
for name, schedule in SCHEDULES.items():
    register(f"schedule, {name}", scheduled(schedule))


@handling("momentum to 0 and back")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.with_momentum()
    for momentum in (0.9, 0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        s.train(3, optimizer)
    return s.numbers()


@handling("momentum, cycled with the rate")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.with_momentum()
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=9)
    for _ in range(8):
        s.train(1, optimizer)
        rates.step()
    return s.numbers()


@handling("load_state_dict in mid-run with momentum")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.with_momentum()
    s.train(2, optimizer)
    state = copy.deepcopy(s.model.state_dict())
    s.train(3, optimizer)
    s.model.load_state_dict(state)
    return s.trained(3, optimizer)


@handling("optimizer.state_dict with momentum")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.with_momentum()
    s.train(3, optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = s.with_momentum()
    other.load_state_dict(torch.load(buffer))
    return s.trained(3, other)


@handling("two optimizers with momentum, in turn")
def _(s: Subject) -> dict[str, Tensor]:
    one, two = s.with_momentum(), s.with_momentum(momentum=0.5)
    for _ in range(2):
        s.train(2, one)
        s.train(2, two)
    return s.numbers()


@handling("deepcopy of model and optimizer with momentum")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.with_momentum()
    s.train(3, optimizer)
    s.model, optimizer = copy.deepcopy((s.model, optimizer))
    return s.trained(3, optimizer)


@handling("AdamW below and SGD above in one FactoredSGD")
def _(s: Subject) -> dict[str, Tensor]:
    groups = [
        {"params": s.model.trunk.parameters(), "lr": 1e-2, "weight_decay": 0.1},
        {"params": s.head.parameters(), "lr": 0.1, "momentum": 0.9},
    ]
    if s.kind == "factored":
        groups[0]["algorithm"] = "adamw"
        return s.trained(6, FactoredSGD(groups))
    adam, sgd = torch.optim.AdamW(groups[:1]), torch.optim.SGD(groups[1:])
    for _ in range(6):
        s.model.zero_grad()
        s.loss().backward()
        adam.step()
        sgd.step()
    return s.numbers()


@handling("a closure")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = s.loss()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return s.numbers()


@handling("AdamW, the head in the second group", refusal=NO_ADAPTIVE)
def _(s: Subject) -> dict[str, Tensor]:
    groups = [{"params": s.model.trunk.parameters()}, {"params": s.head.parameters()}]
    return s.trained(2, torch.optim.AdamW(groups, fused=True))


@handling("AdamW of a deepcopy in eval mode", refusal=NO_ADAPTIVE)
def _(s: Subject) -> dict[str, Tensor]:
    s.model = copy.deepcopy(s.model).eval()
    return s.trained(2, torch.optim.AdamW(s.model.parameters(), fused=True))
