"""What users do to an output layer with PyTorch's tools, each once, for every kind of layer alike.

A handling takes a `Subject`, a small model whose output layer is of one of the kinds, trains or
treats it, and returns numbers (a dict of tensors, W and b as `Subject.W`). All kinds must give the
same. Where a factored layer cannot, the handling says with which error it refuses; then nothing may
have moved. A new handling joins the tests by registration.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from softsphere import FactoredSphericalLoss, LinearSphericalLoss, TaylorSoftmaxLoss
from softsphere.optim import FactoredSGD

d, D, m, LR = 5, 23, 6, 0.5


class Plain(nn.Linear):
    """nn.Linear and a criterion on its outputs."""

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return TaylorSoftmaxLoss()(super().forward(hidden), target)

    def log_prob(self, hidden: Tensor) -> Tensor:
        return TaylorSoftmaxLoss().log_prob(super().forward(hidden))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "plain": lambda **k: Plain(d, D, **k),
    "linear": lambda **k: LinearSphericalLoss(d, D, **k),
    "factored": lambda **k: FactoredSphericalLoss(d, D, **k),
}


class Model(nn.Module):
    """A hidden layer and an output layer; `between` sees the hidden states."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.trunk = nn.Linear(d, d)
        self.head = KINDS[kind](bias=bias)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.head(self.between(self.trunk(x)), target)

    def between(self, hidden: Tensor) -> Tensor:
        return hidden


class Subject:
    """A model in float64 with its own stream of batches, the same for every kind."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        torch.manual_seed(0)
        self.kind, self.bias = kind, bias
        self.model = Model(kind, bias).double()
        first = nn.Linear(d, D, bias=bias).double()
        trunk = nn.Linear(d, d).double()
        self.model.head.load_state_dict(first.state_dict())
        self.model.trunk.load_state_dict(trunk.state_dict())
        self.generator = torch.Generator().manual_seed(1)

    @property
    def head(self) -> nn.Module:
        return self.model.head

    @property
    def W(self) -> Tensor:
        return dense(self.head)

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(m, d, generator=self.generator, dtype=torch.float64)
        return x, torch.randint(D // 2, (m,), generator=self.generator)

    def loss(self) -> Tensor:
        return self.model(*self.batch())

    def sgd(self, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), **{"lr": LR, **options})

    def train(self, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        optimizer = optimizer or self.sgd()
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

    def numbers(self) -> dict[str, Tensor]:
        return {"W": self.W, "trunk": self.model.trunk.weight.detach().clone()}


def dense(head: nn.Module) -> Tensor:
    """[W b] as a new tensor."""
    if isinstance(head, FactoredSphericalLoss):
        return head.dense()
    columns = [head.weight.detach()] + ([] if head.bias is None else [head.bias[:, None].detach()])
    return torch.cat(columns, 1)


@dataclass(frozen=True)
class Handling:
    """run: as above. refusal: the error of a factored layer and words of it; None if it can.

    unmoved: whether a refusal leaves the whole model as it was before `run` was called.
    """

    run: Callable[[Subject], dict[str, Tensor]]
    refusal: tuple[type[Exception], str] | None = None
    bias: bool = True
    unmoved: bool = True


HANDLINGS: dict[str, Handling] = {}


def handling(name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        HANDLINGS[name] = Handling(run, **options)
        return run

    return enter


# Optimizers and schedules.

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
for name, options in SGDS.items():

    @handling(f"torch.optim.SGD, {name}")
    def _(s: Subject, options: dict[str, Any] = options) -> dict[str, Tensor]:
        s.train(8, s.sgd(**options))
        return s.numbers()


for name, options in SGDS.items():
    if "fused" in name:
        continue

    @handling(f"FactoredSGD, {name}")
    def _(s: Subject, options: dict[str, Any] = options) -> dict[str, Tensor]:
        s.train(8, FactoredSGD(s.model.parameters(), **{"lr": LR, **options}))
        return s.numbers()


MOMENTA = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "momentum, maximize": {"momentum": 0.8, "maximize": True, "lr": 0.01},
}


def with_momentum(s: Subject, **options: Any) -> torch.optim.Optimizer:
    """FactoredSGD for a factored layer, torch's own for the others."""
    kind = FactoredSGD if s.kind == "factored" else torch.optim.SGD
    return kind(s.model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


for name, options in MOMENTA.items():

    @handling(f"FactoredSGD against torch.optim.SGD, {name}")
    def _(s: Subject, options: dict[str, Any] = options) -> dict[str, Tensor]:
        s.train(8, with_momentum(s, **options))
        return s.numbers()

    if name != "momentum, maximize":

        @handling(f"torch.optim.SGD, {name}", refusal=(TypeError, "FactoredSGD"))
        def _(s: Subject, options: dict[str, Any] = options) -> dict[str, Tensor]:
            s.train(2, s.sgd(**options))
            return s.numbers()


SCHEDULES = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.5, total_steps=9, cycle_momentum=False
    ),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}
for name, schedule in SCHEDULES.items():

    @handling(f"schedule, {name}")
    def _(s: Subject, schedule: Callable[..., Any] = schedule) -> dict[str, Tensor]:
        optimizer = s.sgd()
        rates = schedule(optimizer)
        for k in range(8):
            s.train(1, optimizer)
            rates.step(k % 3) if "Plateau" in type(rates).__name__ else rates.step()
        return s.numbers()


@handling("momentum to 0 and back")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = with_momentum(s)
    for momentum in (0.9, 0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        s.train(3, optimizer)
    return s.numbers()


@handling("momentum, cycled with the rate")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = with_momentum(s)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=9)
    for _ in range(8):
        s.train(1, optimizer)
        rates.step()
    return s.numbers()


@handling("load_state_dict in mid-run with momentum")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = with_momentum(s)
    s.train(2, optimizer)
    state = copy.deepcopy(s.model.state_dict())
    s.train(3, optimizer)
    s.model.load_state_dict(state)
    s.train(3, optimizer)
    return s.numbers()


@handling("optimizer.state_dict with momentum")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = with_momentum(s)
    s.train(3, optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = with_momentum(s)
    other.load_state_dict(torch.load(buffer))
    s.train(3, other)
    return s.numbers()


@handling("two optimizers with momentum, in turn")
def _(s: Subject) -> dict[str, Tensor]:
    one, two = with_momentum(s), with_momentum(s, momentum=0.5)
    for _ in range(2):
        s.train(2, one)
        s.train(2, two)
    return s.numbers()


@handling("deepcopy of model and optimizer with momentum")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = with_momentum(s)
    s.train(3, optimizer)
    s.model, optimizer = copy.deepcopy((s.model, optimizer))
    s.train(3, optimizer)
    return s.numbers()


@handling("AdamW below and SGD above in one FactoredSGD")
def _(s: Subject) -> dict[str, Tensor]:
    groups = [
        {"params": s.model.trunk.parameters(), "lr": 1e-2, "weight_decay": 0.1},
        {"params": s.head.parameters(), "lr": 0.1, "momentum": 0.9},
    ]
    if s.kind == "factored":
        groups[0]["algorithm"] = "adamw"
        s.train(6, FactoredSGD(groups))
        return s.numbers()
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
for name, kind in ADAPTIVE.items():

    @handling(name, refusal=(TypeError, "FactoredSGD"))
    def _(s: Subject, kind: Any = kind) -> dict[str, Tensor]:
        s.train(2, kind(s.model.parameters()))
        return s.numbers()


@handling("AdamW, the head in the second group", refusal=(TypeError, "FactoredSGD"))
def _(s: Subject) -> dict[str, Tensor]:
    groups = [{"params": s.model.trunk.parameters()}, {"params": s.head.parameters()}]
    s.train(2, torch.optim.AdamW(groups, fused=True))
    return s.numbers()


@handling("AdamW of a deepcopy in eval mode", refusal=(TypeError, "FactoredSGD"))
def _(s: Subject) -> dict[str, Tensor]:
    s.model = copy.deepcopy(s.model).eval()
    s.train(2, torch.optim.AdamW(s.model.parameters(), fused=True))
    return s.numbers()


# Gradients between backward and step.


@handling("zero_grad(set_to_none=False)")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()
    for k in range(6):
        (optimizer if k % 2 else s.model).zero_grad(set_to_none=False)
        s.loss().backward()
        optimizer.step()
    return s.numbers()


@handling("micro-batches")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd(weight_decay=0.05)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        for _ in range(3):
            (s.loss() / 3).backward()
        optimizer.step()
    return s.numbers()


for foreach in (None, True):

    @handling(f"clip_grad_norm_ over everything, foreach={foreach}")
    def _(s: Subject, foreach: bool | None = foreach) -> dict[str, Tensor]:
        optimizer, norms = s.sgd(), []
        for _ in range(5):
            optimizer.zero_grad()
            s.loss().backward()
            every = s.model.parameters()
            norms.append(nn.utils.clip_grad_norm_(every, 0.05, foreach=foreach).detach())
            optimizer.step()
        return {**s.numbers(), "norms": torch.stack(norms)}


def clipped(s: Subject, clip: Callable[[Any], Any]) -> dict[str, Tensor]:
    optimizer = s.sgd()
    s.loss().backward()
    clip(s.model.parameters())
    optimizer.step()
    return s.numbers()


@handling("clip_grad_norm_ by the largest number", refusal=(TypeError, "2-norm"))
def _(s: Subject) -> dict[str, Tensor]:
    return clipped(s, lambda p: nn.utils.clip_grad_norm_(p, 1.0, float("inf")))


@handling("clip_grad_value_", refusal=(TypeError, "clip its gradient by norm|Clip"))
def _(s: Subject) -> dict[str, Tensor]:
    return clipped(s, lambda p: nn.utils.clip_grad_value_(p, 0.01))


@handling("a gradient scaled between two backward calls")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()
    for _ in range(3):
        optimizer.zero_grad()
        s.loss().backward()
        with torch.no_grad():
            for p in s.model.parameters():
                p.grad.mul_(0.5)
        (0.5 * s.loss()).backward()
        optimizer.step()
    return s.numbers()


@handling(
    "backward, load_state_dict, backward, step",
    refusal=(RuntimeError, "zero_grad"),
    unmoved=False,
)
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()
    state = copy.deepcopy(s.model.state_dict())
    s.train(1, optimizer)
    s.loss().backward()
    s.model.load_state_dict(state)
    s.loss().backward()
    optimizer.step()
    return s.numbers()


@handling("two steps of one gradient", refusal=(RuntimeError, "zero_grad"), unmoved=False)
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()
    s.loss().backward()
    optimizer.step()
    optimizer.step()
    return s.numbers()


@handling(
    "a gradient kept from an earlier step", refusal=(RuntimeError, "zero_grad"), unmoved=False
)
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()
    s.loss().backward()
    kept = [p.grad.clone() for p in s.model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    s.loss().backward()
    for p, g in zip(s.model.parameters(), kept, strict=True):
        p.grad += 0.5 * g
    optimizer.step()
    return s.numbers()


@handling("a hook on the weight's gradient")
def _(s: Subject) -> dict[str, Tensor]:
    for p in s.head.parameters():
        p.register_hook(lambda g: g * 0.25)
    s.train(4)
    return s.numbers()


@handling("a hook after accumulation that steps")
def _(s: Subject) -> dict[str, Tensor]:
    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.add_(p.grad, alpha=-0.3)
        p.grad = None

    for p in s.model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        s.loss().backward()
    return s.numbers()


@handling("autograd.grad and a step by hand")
def _(s: Subject) -> dict[str, Tensor]:
    for _ in range(4):
        parameters = list(s.model.parameters())
        grads = torch.autograd.grad(s.loss(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.sub_(0.3 * g)
    return s.numbers()


@handling("torch._foreach_add_ by hand")
def _(s: Subject) -> dict[str, Tensor]:
    for _ in range(3):
        parameters = list(s.model.parameters())
        grads = torch.autograd.grad(s.loss(), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, torch._foreach_mul(grads, -0.3))
            torch._foreach_mul_(parameters, 0.99)
    return s.numbers()


class Halved(torch.autograd.Function):
    """Scales the gradient by hidden in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.mul_(0.5)


for bias in (True, False):

    @handling(f"a Function below that scales hidden's gradient in place, bias={bias}", bias=bias)
    def _(s: Subject) -> dict[str, Tensor]:
        s.model.between = Halved.apply
        s.train(4)
        return s.numbers()

    @handling(f"hidden's buffer reused before the step, bias={bias}", bias=bias)
    def _(s: Subject) -> dict[str, Tensor]:
        optimizer = s.sgd()
        buffer, targets = torch.empty(m, d, dtype=torch.float64), torch.empty(m, dtype=torch.long)
        for _ in range(4):
            x, target = s.batch()
            with torch.no_grad():
                hidden = buffer.copy_(x)
            targets.copy_(target)
            optimizer.zero_grad()
            s.head(hidden, targets).backward()
            buffer.fill_(7.0)
            targets.fill_(3)
            optimizer.step()
        return s.numbers()


for overflow in (False, True):

    @handling(f"GradScaler with clipping, overflow={overflow}")
    def _(s: Subject, overflow: bool = overflow) -> dict[str, Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        optimizer = s.sgd()
        for k in range(5):
            optimizer.zero_grad()
            scaled = scaler.scale(s.loss())
            (scaled * torch.inf if overflow and k == 2 else scaled).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(s.model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
        return {**s.numbers(), "scale": torch.tensor(scaler.get_scale())}


@handling("GradScaler with fused SGD")
def _(s: Subject) -> dict[str, Tensor]:
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=256.0), s.sgd(fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(s.loss()).backward()
        scaler.step(optimizer)
        scaler.update()
    return s.numbers()


@handling("the norm of a gradient, by many names")
def _(s: Subject) -> dict[str, Tensor]:
    s.loss().backward()
    grads = [p.grad for p in s.head.parameters()]
    each = [
        lambda g: g.norm(),
        torch.linalg.vector_norm,
        torch.norm,
        lambda g: torch._foreach_norm([g])[0],
        lambda g: (2 * g).norm() / 2,
        lambda g: (-g + 3 * g).norm() / 2,
    ]
    return {str(k): sum(f(g) ** 2 for g in grads) for k, f in enumerate(each)}


@handling("torch.isfinite")
def _(s: Subject) -> dict[str, Tensor]:
    s.loss().backward()
    every = [x for p in s.model.parameters() for x in (p, p.grad)]
    good = torch.stack([torch.isfinite(x).all() for x in every])
    (s.loss() * torch.nan).backward()
    bad = torch.stack([p.grad.isfinite().all() for p in s.model.parameters()])
    return {"good": good.all(), "bad": bad.any()}


# Penalties.


@handling("L2 by hand, p.norm() ** 2")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()
    for _ in range(4):
        optimizer.zero_grad()
        penalty = sum(p.norm() ** 2 for p in s.model.parameters())
        (s.loss() + 0.01 * penalty).backward()
        optimizer.step()
    return s.numbers()


for name, square in {"pow": lambda p: p.pow(2), "**": lambda p: p**2}.items():

    @handling(
        f"L2 by hand, {name}", refusal=(TypeError, r"p\.norm\(\) \*\* 2.*weight_decay|P\.norm")
    )
    def _(s: Subject, square: Callable[[Tensor], Tensor] = square) -> dict[str, Tensor]:
        optimizer = s.sgd()
        (s.loss() + 0.01 * sum(square(p).sum() for p in s.model.parameters())).backward()
        optimizer.step()
        return s.numbers()


# Copies, averages and checkpoints.


@handling("deepcopy between backward and step")
def _(s: Subject) -> dict[str, Tensor]:
    s.train(2)
    s.model.zero_grad()
    s.loss().backward()
    other = copy.deepcopy(s.model)
    s.sgd().step()
    first = s.W
    s.model = other
    s.sgd().step()  # the copy of a parameter has no gradient
    s.train(1)
    return {**s.numbers(), "first": first}


@handling("double, float and back with a gradient")
def _(s: Subject) -> dict[str, Tensor]:
    s.train(2)
    s.model.zero_grad()
    s.loss().backward()
    s.model.to(torch.float32).double()
    assert {p.grad.dtype for p in s.model.parameters()} == {torch.float64}
    grads = {"norm": sum(p.grad.norm() ** 2 for p in s.head.parameters()).float()}
    s.sgd().step()
    # equal but for the rounding to float32, which is not the same of factors
    return {**grads, "W": s.W.float().round(decimals=4)}


for how in (torch.float16, torch.bfloat16):

    @handling(f"to {how}", refusal=(TypeError, "float32 or float64.*autocast"))
    def _(s: Subject, how: torch.dtype = how) -> dict[str, Tensor]:
        s.head.to(how)
        return {}


AVERAGES = {
    "swa": {},
    "swa, multi": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "a function": {"avg_fn": lambda a, p, n: 0.7 * a + 0.3 * p},
}
for name, options in AVERAGES.items():

    @handling(f"AveragedModel, {name}")
    def _(s: Subject, options: dict[str, Any] = options) -> dict[str, Tensor]:
        average, optimizer = AveragedModel(s.model, **options), s.sgd()
        logs = []
        for _ in range(4):
            s.train(1, optimizer)
            average.update_parameters(s.model)
            # used between updates
            logs.append(average.module.head.log_prob(torch.ones(1, d, dtype=torch.float64)))
        return {**s.numbers(), "average": dense(average.module.head), "logs": torch.cat(logs)}


@handling("an average by hand over state_dict()")
def _(s: Subject) -> dict[str, Tensor]:
    average, optimizer = copy.deepcopy(s.model.state_dict()), s.sgd()
    for _ in range(4):
        s.train(1, optimizer)
        for key, value in s.model.state_dict().items():
            average[key].mul_(0.8).add_(value, alpha=0.2)
    s.model.load_state_dict(average)
    return {**s.numbers(), "log": s.head.log_prob(torch.ones(1, d, dtype=torch.float64))}


@handling("an average by hand over parameters()")
def _(s: Subject) -> dict[str, Tensor]:
    other, optimizer = copy.deepcopy(s.model), s.sgd()
    for _ in range(4):
        s.train(1, optimizer)
        with torch.no_grad():
            for a, p in zip(other.parameters(), s.model.parameters(), strict=True):
                a.lerp_(p, 0.2)
                a.mul_(0.9).add_(p, alpha=0.1)
    s.model = other
    s.train(1)
    return s.numbers()


@handling("a state_dict that is kept")
def _(s: Subject) -> dict[str, Tensor]:
    s.train(3)
    state = s.model.state_dict()
    now = s.W
    kept = torch.cat([state["head.weight"], state["head.bias"].unsqueeze(1)], 1).clone()
    s.train(3)
    later = torch.cat([state["head.weight"], state["head.bias"].unsqueeze(1)], 1)
    # a view of W as it is now, as of an ordinary layer, or a copy of what it was
    assert any(torch.allclose(later, x, rtol=0, atol=1e-12) for x in (now, s.W))
    return {**s.numbers(), "kept": kept}


@handling("a state_dict that is changed in place")
def _(s: Subject) -> dict[str, Tensor]:
    s.train(2)
    state = s.model.state_dict()
    state["head.weight"].mul_(1.5)
    state["head.bias"][3] = 2.0
    log = s.head.log_prob(torch.ones(1, d, dtype=torch.float64))
    s.train(2)
    return {**s.numbers(), "log": log}


def through(s: Subject, way: Callable[[Any], Any]) -> dict[str, Tensor]:
    s.train(3)
    s.model = way(s.model)
    s.train(3)
    return s.numbers()


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.head.weight)
    other.load_state_dict(torch.load(buffer))
    return other


def whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assigned(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


for name, way in {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save of the state": saved,
    "torch.save of the model": whole,
    "load_state_dict(assign=True)": assigned,
}.items():

    @handling(name)
    def _(s: Subject, way: Callable[[Any], Any] = way) -> dict[str, Tensor]:
        return through(s, way)


@handling("to_empty and skip_init, then loaded")
def _(s: Subject) -> dict[str, Tensor]:
    state = s.model.state_dict()
    with torch.device("meta"):
        other = Model(s.kind).double()
    other.to_empty(device="cpu").load_state_dict(state)
    s.model = other
    s.train(2)
    kind = type(s.head)
    fresh = nn.utils.skip_init(kind, d, D, dtype=torch.float64)
    fresh.load_state_dict(s.head.state_dict())
    s.model.head = fresh
    s.train(2)
    return s.numbers()


@handling("counts of parameters")
def _(s: Subject) -> dict[str, Tensor]:
    every = list(s.model.parameters())
    return {
        "numbers": torch.tensor(sum(p.numel() for p in every)),
        "bytes": torch.tensor(sum(p.numel() * p.element_size() for p in every)),
    }


@handling("functional_call with other weights", refusal=(TypeError, "load_state_dict"))
def _(s: Subject) -> dict[str, Tensor]:
    other = {"weight": torch.ones(D, d + (s.kind == "factored"), dtype=torch.float64)}
    loss = torch.func.functional_call(s.head, other, s.batch())
    return {"loss": loss.detach()}


# Initialisers.

INITIALISERS = {
    name: getattr(nn.init, name)
    for name in (
        "zeros_", "ones_", "eye_", "uniform_", "normal_", "xavier_uniform_", "xavier_normal_",
        "kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "orthogonal_",
    )
}  # fmt: skip
INITIALISERS["constant_"] = lambda w: nn.init.constant_(w, 0.3)
INITIALISERS["sparse_"] = lambda w: nn.init.sparse_(w, 0.4)
for name, initialise in INITIALISERS.items():

    @handling(f"nn.init.{name}", bias=False)
    def _(s: Subject, initialise: Callable[[Tensor], Any] = initialise) -> dict[str, Tensor]:
        s.train(2)
        torch.manual_seed(3)
        initialise(s.head.weight)
        before = s.W
        s.train(2)
        return {**s.numbers(), "before": before}


@handling("the bias and a row set to zero")
def _(s: Subject) -> dict[str, Tensor]:
    s.train(2)
    nn.init.zeros_(s.head.bias)
    with torch.no_grad():
        s.head.weight[3].zero_()
        s.head.weight.data[torch.tensor([1, 4])] = 0.0
        s.head.bias[torch.tensor([1, 4])] = 0.0
        s.head.bias[3] = 0.0
    before = s.W
    s.train(2)
    return {**s.numbers(), "before": before}


# Reading.


@handling("rows, slices and outputs")
def _(s: Subject) -> dict[str, Tensor]:
    s.train(2)
    with torch.no_grad():
        w, index = s.head.weight, torch.tensor([[1, 2], [5, 1]])
        hidden = torch.randn(2, 3, d, generator=s.generator, dtype=torch.float64)
        hidden = nn.functional.pad(hidden, (0, w.shape[1] - d))
        return {
            "row": w[3][:d].clone(),
            "last": w[-1, 1].clone(),
            "slice": w[2:9:3, :d].clone(),
            "rows": w[index.flatten()][:, :d],
            "embedding": nn.functional.embedding(index, w)[..., :d],
            "select": w.index_select(0, index.flatten())[:, :d],
            "column": w[:, 2].clone(),
            "outputs": hidden @ w.T,
            "linear": nn.functional.linear(hidden, w),
            "bias": s.head.bias.clone(),
        }


# What needs all D × d numbers, or a weight that is another tensor.


def pruned(head: nn.Module) -> None:
    import torch.nn.utils.prune as prune

    prune.l1_unstructured(head, "weight", 0.5)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "prune": (pruned, "pruning"),
    "spectral_norm": (
        lambda h: nn.utils.parametrizations.spectral_norm(h, "weight"),
        "LinearSphericalLoss",
    ),
    "weight_norm": (lambda h: nn.utils.parametrizations.weight_norm(h, "weight"), "2-norm"),
    "stack_module_state": (
        lambda h: torch.func.stack_module_state([h, copy.deepcopy(h)]),
        "cannot be stacked",
    ),
    "parameters_to_vector": (
        lambda h: nn.utils.parameters_to_vector(h.parameters()),
        "LinearSphericalLoss",
    ),
    "numpy": (lambda h: h.weight.detach().numpy(), "to_dense"),
}
for name, (call, words) in REFUSED.items():

    @handling(name, refusal=(TypeError, words))
    def _(s: Subject, call: Callable[[nn.Module], Any] = call) -> dict[str, Tensor]:
        call(s.head)
        return {}


@handling("a weight that is replaced", refusal=(TypeError, "FactoredTensor"), unmoved=False)
def _(s: Subject) -> dict[str, Tensor]:
    s.head.weight = nn.Parameter(torch.ones(D, d + (s.kind == "factored"), dtype=torch.float64))
    return {"loss": s.loss().detach()}


@handling("p.data = another tensor", refusal=(TypeError, "copy_"))
def _(s: Subject) -> dict[str, Tensor]:
    s.head.weight.data = (
        torch.ones_like(s.head.weight.data.to("meta"), device="cpu")
        if s.kind != "factored"
        else torch.ones(D, d + 1, dtype=torch.float64)
    )
    return s.numbers()


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@handling("parametrize", refusal=(TypeError, "parametrization"), unmoved=False)
def _(s: Subject) -> dict[str, Tensor]:
    nn.utils.parametrize.register_parametrization(s.head, "weight", Doubled())
    s.train(1)
    return {}
