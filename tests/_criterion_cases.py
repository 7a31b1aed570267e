"""PyTorch's own cases for nn.CrossEntropyLoss and nn.NLLLoss, for every criterion of the package.

The cases are read from the installed torch, so that a new one joins by itself; so does a new loss.
The log-probabilities of nn.NLLLoss are logits whose cross-entropy is that loss.

Left out are memory formats and devices that are not there; size_average and reduce, which
reduction has replaced, and arguments by place; and nn.LinearCrossEntropyLoss, which is a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from _torch_cases import torchs_own
from softsphere import (
    SoftMarginSoftmaxLoss,
    SphericalLoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    losses,
)

MODULES = torchs_own("common_modules").module_db
INFOS = [x for x in MODULES if x.module_cls in (nn.CrossEntropyLoss, nn.NLLLoss)]
DTYPES = sorted({x for info in INFOS for x in info.supported_dtypes("cpu")}, key=str)

CRITERIA: dict[str, Callable[..., SphericalLoss]] = {
    **{name: partial(SphericalLoss, name) for name in losses.REGISTRY},
    "TaylorSoftmaxLoss": TaylorSoftmaxLoss,
    "SphericalSoftmaxLoss": SphericalSoftmaxLoss,
    "SoftMarginSoftmaxLoss": SoftMarginSoftmaxLoss,
}
SAME = {
    "TaylorSoftmaxLoss": "taylor_softmax",
    "SphericalSoftmaxLoss": "spherical_softmax",
    "SoftMarginSoftmaxLoss": "soft_margin_softmax",
}
every_criterion = pytest.mark.parametrize("name", CRITERIA)


class Case(NamedTuple):
    """Arguments of a criterion and of its forward."""

    torchs: type[nn.Module]
    options: dict[str, Any]
    logits: Tensor
    target: Tensor


def cases(dtype: torch.dtype) -> dict[str, Case]:
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for info in INFOS:
            if dtype not in info.supported_dtypes("cpu"):
                continue
            for x in info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=True, training=True
            ):
                made, given = x.constructor_input, x.forward_input
                assert not made.args and not given.kwargs, "a case of another form: read it"
                name = f"{info.module_cls.__name__} {x.desc}"
                found[name] = Case(info.module_cls, made.kwargs, *(t.detach() for t in given.args))
    return found


CASES = {dtype: cases(dtype) for dtype in DTYPES}
DOUBLE = CASES[torch.float64]
SMALL = {
    dtype: {name: case for name, case in found.items() if case.logits.numel() <= 15}
    for dtype, found in CASES.items()
}


def reduced(among: dict[str, Case], reduction: str) -> dict[str, Case]:
    """The cases with one reduction."""
    return {
        name: case
        for name, case in among.items()
        if case.options.get("reduction", "mean") == reduction
    }


# For tests of things that do not depend on the shape or the reduction.
FEW = reduced(SMALL[torch.float64], "mean")


def meaningless(name: str, case: Case) -> str | None:
    """The option that a loss refuses by its nature, if the case has one."""
    loss = CRITERIA[name]().loss
    if case.options.get("label_smoothing") and not loss.smoothable:
        return "label_smoothing"
    probabilities = case.target.is_floating_point()
    if isinstance(loss, losses.SquaredError) and probabilities and "weight" in case.options:
        return "weight"
    return None


def suited(name: str, among: dict[str, Case]) -> dict[str, Case]:
    return {key: case for key, case in among.items() if not meaningless(name, case)}


def gradients(criterion: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The value, and the gradients for logits and class probabilities of a seeded upstream."""
    inputs = [logits.detach().requires_grad_()]
    if target.is_floating_point():
        target = target.detach().requires_grad_()
        inputs.append(target)
    value = criterion(inputs[0], target)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.rand(value.shape, generator=generator, dtype=value.dtype)
    return (value, *torch.autograd.grad(value, inputs, upstream))
