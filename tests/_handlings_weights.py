"""Handlings of the weight itself: initialisers, reading, and tools that need a dense weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from _registry import Run, handling, register
from _subject import D, Subject, d

INITIALISERS = {
    name: getattr(nn.init, name)
    for name in (
        "zeros_", "ones_", "eye_", "uniform_", "normal_", "xavier_uniform_", "xavier_normal_",
        "kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "orthogonal_",
    )
}  # fmt: skip
INITIALISERS["constant_"] = lambda w: nn.init.constant_(w, 0.3)
INITIALISERS["sparse_"] = lambda w: nn.init.sparse_(w, 0.4)


def initialised(initialise: Callable[[Tensor], Any]) -> Run:
    """Initialisation in mid-training, with a seed."""

    def run(s: Subject) -> dict[str, Tensor]:
        s.train(2)
        torch.manual_seed(3)
        initialise(s.head.weight)
        before = s.W
        return {**s.trained(2), "before": before}

    return run


for name, initialise in INITIALISERS.items():
    register(f"nn.init.{name}", initialised(initialise), bias=False)


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


def pruned(head: nn.Module) -> None:
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


def called(call: Callable[[nn.Module], Any]) -> Run:
    def run(s: Subject) -> dict[str, Tensor]:
        call(s.head)
        return {}

    return run


for name, (call, words) in REFUSED.items():
    register(name, called(call), refusal=(TypeError, words))


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
