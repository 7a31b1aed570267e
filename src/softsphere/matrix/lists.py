"""Operations on lists of tensors, which optimizers, gradient clipping and GradScaler use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softsphere.matrix.changes import plan_step
from softsphere.matrix.gradient_tensors import StructuredGradient
from softsphere.matrix.refusals import MOMENTUM, refusal
from softsphere.matrix.sums import summed
from softsphere.matrix.tensors import FactoredTensor
from softsphere.matrix.wrapper import OPERATIONS, Operand, Wrapper

_aten = torch.ops.aten


def foreach(func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does an operation on each tensor of a list, or refuses it before any has changed."""
    xs = args[0]
    n = len(xs)

    def item(x: Any, i: int) -> Any:
        return x[i] if isinstance(x, (list, tuple)) and len(x) == n else x

    calls = [
        ([item(x, i) for x in args], {k: item(x, i) for k, x in kwargs.items()}) for i in range(n)
    ]
    ours = [i for i, (each, _) in enumerate(calls) if any(isinstance(x, Wrapper) for x in each)]
    for i in ours:
        mine = next(x for x in calls[i][0] if isinstance(x, Wrapper))
        if packet not in OPERATIONS[type(mine)]:
            raise refusal(func, mine.described)
    if packet in (_aten.add_, _aten.sub_):
        return _foreach_add(packet, calls, ours)
    results: list[Any] = [None] * n
    # Ours come first: if one of them is refused, nothing else has changed.
    for i in (*ours, *(i for i in range(n) if i not in ours)):
        results[i] = packet(*calls[i][0], **calls[i][1])
    return None if packet.__name__.endswith("_") else results


def _foreach_add(
    packet: Any, calls: list[tuple[list[Any], dict[str, Any]]], ours: list[int]
) -> None:
    """Adds to each tensor of a list. All steps are planned before the first is taken."""
    check_distinct([calls[i][0][0] for i in ours])
    steps: list[Callable[[], Any]] = []
    taken: set[int] = set()
    for i in ours:
        (x, other, *more), named = calls[i]
        alpha = named.get("alpha", more[0] if more else 1)
        if isinstance(x, FactoredTensor) and isinstance(other, StructuredGradient):
            steps.append(plan_step(x, other, -alpha if packet is _aten.sub_ else alpha))
            taken.add(i)
        elif isinstance(x, StructuredGradient) and isinstance(other, Wrapper):
            summed(packet, x.content, other, alpha)  # raises if it is refused
    for take in steps:
        take()
    for i, (each, named) in enumerate(calls):
        if i not in taken:
            packet(*each, **named)


def check_distinct(params: Sequence[Any]) -> None:
    """Raises ValueError if a factored weight occurs twice.

    Of two steps that are planned at the same weight only one could be taken.
    """
    weights = [id(x.matrix) for x in params if isinstance(x, FactoredTensor)]
    if len(set(weights)) < len(weights):
        raise ValueError(
            "an optimizer was given a factored weight twice; give it each parameter once"
        )


def unscale(func: Any, grads: Sequence[Tensor], found: Tensor, inverse: Tensor) -> None:
    """Multiplies gradients by a number and notes whether any is not finite, for GradScaler."""
    plain = [g for g in grads if not isinstance(g, Wrapper)]
    if plain:
        func(plain, found, inverse)
    for g in grads:
        if isinstance(g, StructuredGradient):
            found.copy_(torch.maximum(found, (~g.value.is_finite()).to(found)))
            g.mul_(inverse.squeeze())


def fused_sgd(
    func: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    weight_decay: float,
    momentum: float,
    lr: Operand,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    **named: Any,
) -> None:
    """Takes the step of torch.optim.SGD(fused=True); the arguments are those of its operator."""
    options = {
        "weight_decay": weight_decay, "momentum": momentum, "lr": lr, "maximize": maximize,
        "grad_scale": grad_scale, "found_inf": found_inf, **named,
    }  # fmt: skip
    if momentum:
        raise TypeError(f"a factored weight cannot be stepped with momentum: {MOMENTUM}")
    check_distinct(params)
    skipped = found_inf is not None and bool(found_inf)
    steps: list[Callable[[], Any]] = []
    for x, g in zip(params, grads, strict=True):
        if not isinstance(x, FactoredTensor) or skipped:
            continue
        if grad_scale is not None:
            g = g / grad_scale
        g = -g if maximize else g
        g = g.add(x, alpha=weight_decay) if weight_decay else g
        if isinstance(g, StructuredGradient):
            steps.append(plan_step(x, g, -float(lr)))
        else:
            steps.append(functools.partial(x.add_, g, alpha=-float(lr)))
    for take in steps:
        take()
    mine = [isinstance(x, FactoredTensor) for x in params]
    rest = [
        [x for x, is_mine in zip(xs, mine, strict=True) if not is_mine] if xs else []
        for xs in (params, grads, buffers)
    ]
    if rest[0]:
        func(*rest, **options)
