"""Handlings of copies, conversions, averages and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from _registry import Run, handling, register
from _subject import ONE_CLUSTER, D, Model, Subject, d, dense


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


def to_half_precision(dtype: torch.dtype) -> Run:
    def run(s: Subject) -> dict[str, Tensor]:
        s.head.to(dtype)
        return {}

    return run


for dtype in (torch.float16, torch.bfloat16):
    register(
        f"to {dtype}",
        to_half_precision(dtype),
        refusal=(TypeError, "float32 or float64.*autocast"),
    )
AVERAGES = {
    "swa": {},
    "swa, multi": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "a function": {"avg_fn": lambda a, p, n: 0.7 * a + 0.3 * p},
}


def averaged(options: dict[str, Any]) -> Run:
    """Training beside an AveragedModel, which is used between its updates."""

    def run(s: Subject) -> dict[str, Tensor]:
        average, optimizer = AveragedModel(s.model, **options), s.sgd()
        logs = []
        for _ in range(4):
            s.train(1, optimizer)
            average.update_parameters(s.model)
            logs.append(average.module.head.log_prob(torch.ones(1, d, dtype=torch.float64)))
        return {**s.numbers(), "average": dense(average.module.head), "logs": torch.cat(logs)}

    return run


for name, options in AVERAGES.items():
    register(f"AveragedModel, {name}", averaged(options))


@handling("an average by hand over state_dict()")
def _(s: Subject) -> dict[str, Tensor]:
    average, optimizer = copy.deepcopy(s.model.state_dict()), s.sgd()
    for _ in range(4):
        s.train(1, optimizer)
        for key, value in s.model.state_dict().items():
            if value.is_floating_point():
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


def through(way: Callable[[nn.Module], nn.Module]) -> Run:
    """Training, with the model replaced on the way."""

    def run(s: Subject) -> dict[str, Tensor]:
        s.train(3)
        s.model = way(s.model)
        return s.trained(3)

    return run


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
    register(name, through(way))


@handling("safetensors into a dense layer and back", needs="safetensors", like_linear=True)
def _(s: Subject) -> dict[str, Tensor]:
    from safetensors.torch import load, save

    s.train(2)
    other = Subject("plain", s.bias)
    other.model.load_state_dict(load(save(s.model.state_dict())))
    other.train(2)
    s.model.load_state_dict(load(save(other.model.state_dict())))
    return s.trained(2)


@handling("to_empty and skip_init, then loaded")
def _(s: Subject) -> dict[str, Tensor]:
    state = s.model.state_dict()
    with torch.device("meta"):
        other = Model(s.kind).double()
    other.to_empty(device=s.W.device).load_state_dict(state)
    s.model = other
    s.train(2)
    kind, clusters = type(s.head), [ONE_CLUSTER] if s.kind == "clustered" else []
    fresh = nn.utils.skip_init(kind, d, D, *clusters, dtype=torch.float64, device=s.W.device)
    fresh.load_state_dict(s.head.state_dict())
    s.model.head = fresh
    s.train(2)
    return s.numbers()


@handling("counts of parameters", like_linear=True)
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
