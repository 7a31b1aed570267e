"""The factored layer beside a dense W under torch's SGD, step for step."""

from __future__ import annotations

import pytest
import torch

from _cases import CASES
from _twin import DenseTwin
from softsphere import FactoredSphericalLoss, losses
from softsphere.optim import FactoredSGD

SPHERICAL = {name: case[0] for name, case in CASES.items() if isinstance(case[0], losses.Spherical)}

# What a run varies: each of these with every loss.
SETTINGS = {
    "plain": {},
    "prior": {"prior": True},
    "bias": {"bias": True},
    "decay": {"weight_decay": 0.02},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "prior": True, "bias": True},
    "sparse": {"K": 3},
    "sparse prior bias": {"K": 3, "prior": True, "bias": True, "momentum": 0.5},
    "one row": {"m": 1},
    "one row momentum": {"m": 1, "momentum": 0.9},
    "more rows than width": {"m": 17},
    "more rows, all at once": {
        "m": 17, "momentum": 0.9, "prior": True, "bias": True, "weight_decay": 0.02,
    },
    "repeated targets": {"classes": 2},
    "repeated targets, many rows": {"m": 17, "classes": 2, "prior": True},
    "ignored rows": {"ignored": True},
    "sum": {"reduction": "sum"},
}  # fmt: skip


def batches(steps, m, d, D, K, classes, ignored):
    """Seeded batches, their widths decaying so that some directions wear more than others."""
    scale = torch.logspace(0, -1, d, dtype=torch.float64)
    for step in range(steps):
        hidden = torch.randn(m, d, dtype=torch.float64) * scale + 0.2
        target = torch.randint(classes or D, (m,) if K is None else (m, K))
        if K is not None:
            target[torch.rand(m, K) < 0.2] = -1
        if ignored and m > 1:
            target[step % m] = -100
        values = None if K is None else torch.rand(m, K, dtype=torch.float64) + 0.5
        yield hidden, target, values


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SPHERICAL)
def test_200_steps_are_those_of_the_dense_layer(name, setting):
    torch.manual_seed(0)
    options = dict(SETTINGS[setting])
    m, K, classes = options.pop("m", 4), options.pop("K", None), options.pop("classes", None)
    bias, ignored = options.pop("bias", False), options.pop("ignored", False)
    reduction = options.pop("reduction", "mean")
    d, D, steps = 5, 13, 200
    prior = torch.rand(D).double() + 0.3 if options.pop("prior", False) else None
    kind = SPHERICAL[name]
    head = FactoredSphericalLoss(
        d, D, kind, bias=bias, prior=prior, reduction=reduction, dtype=torch.float64
    )
    lr = {"squared_error": 0.02, "bouchard_bound": 0.01, "bohning_bound": 0.05}.get(name, 0.1)
    lr = lr / (m if reduction == "sum" else 1) * (1 - options.get("momentum", 0))
    twin = DenseTwin(
        head.to_linear().weight, head.to_linear().bias, head.matrix.arrays.pi, lr=lr, **options
    )
    optimizer = FactoredSGD(head.parameters(), lr=lr, **options)
    for hidden, target, values in batches(steps, m, d, D, K, classes, ignored):
        one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        got = head(one, target, values)
        rows = twin.loss(kind, two, target, values)
        counted = m if K is not None else int((target != -100).sum())
        want = rows.sum() / (counted if reduction == "mean" else 1)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
        twin.sgd.zero_grad()
        got.backward()
        want.backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-10)
        optimizer.step()
        twin.sgd.step()
    torch.testing.assert_close(head.dense(), twin.W.detach(), rtol=1e-10, atol=1e-10)
    health = head.health()
    assert health.inverse_drift < 1e-10
    assert health.gram_drift < 1e-10
