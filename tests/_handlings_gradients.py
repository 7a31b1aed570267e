"""Handlings of gradients between the backward call and the step, and of penalties."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _registry import Run, handling, register
from _subject import Subject, d, m


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


def clipped(steps: int, clip: Callable[[Any], Any]) -> Run:
    """Steps of SGD with gradients that `clip` has treated; also returns what `clip` returned."""

    def run(s: Subject) -> dict[str, Tensor]:
        optimizer, norms = s.sgd(), []
        for _ in range(steps):
            optimizer.zero_grad()
            s.loss().backward()
            norms.append(clip(s.model.parameters()).detach())
            optimizer.step()
        return {**s.numbers(), "norms": torch.stack(norms)}

    return run


for foreach in (None, True):
    register(
        f"clip_grad_norm_ over everything, foreach={foreach}",
        clipped(5, lambda p, f=foreach: nn.utils.clip_grad_norm_(p, 0.05, foreach=f)),
    )
register(
    "clip_grad_norm_ by the largest number",
    clipped(1, lambda p: nn.utils.clip_grad_norm_(p, 1.0, float("inf"))),
    refusal=(TypeError, "2-norm"),
)
register(
    "clip_grad_value_",
    clipped(1, lambda p: nn.utils.clip_grad_value_(p, 0.01)),
    refusal=(TypeError, "clip its gradient by norm|Clip"),
)


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


def halved_below(s: Subject) -> dict[str, Tensor]:
    s.model.between = Halved.apply
    return s.trained(4)


def buffers_reused(s: Subject) -> dict[str, Tensor]:
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


for bias in (True, False):
    register(
        f"a Function below that scales hidden's gradient in place, bias={bias}",
        halved_below,
        bias=bias,
    )
    register(f"hidden's buffer reused before the step, bias={bias}", buffers_reused, bias=bias)


def scaled_with_overflow(overflow: bool) -> Run:
    """Training with a GradScaler and clipping; one loss is infinite if `overflow`."""

    def run(s: Subject) -> dict[str, Tensor]:
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

    return run


for overflow in (False, True):
    register(f"GradScaler with clipping, overflow={overflow}", scaled_with_overflow(overflow))


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


@handling("L2 by hand, p.norm() ** 2")
def _(s: Subject) -> dict[str, Tensor]:
    optimizer = s.sgd()
    for _ in range(4):
        optimizer.zero_grad()
        penalty = sum(p.norm() ** 2 for p in s.model.parameters())
        (s.loss() + 0.01 * penalty).backward()
        optimizer.step()
    return s.numbers()


def penalised(square: Callable[[Tensor], Tensor]) -> Run:
    """One step of the loss and a sum of squares of every parameter."""

    def run(s: Subject) -> dict[str, Tensor]:
        optimizer = s.sgd()
        (s.loss() + 0.01 * sum(square(p).sum() for p in s.model.parameters())).backward()
        optimizer.step()
        return s.numbers()

    return run


for name, square in {"pow": lambda p: p.pow(2), "**": lambda p: p**2}.items():
    register(
        f"L2 by hand, {name}",
        penalised(square),
        refusal=(TypeError, r"p\.norm\(\) \*\* 2.*weight_decay|P\.norm"),
    )
