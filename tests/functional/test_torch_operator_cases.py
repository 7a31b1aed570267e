"""PyTorch's own operator cases for F.cross_entropy and F.linear_cross_entropy, for every loss.

The cases are read from the installed torch, so that a new one joins by itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _torch_cases import torchs_own
from softsphere import LinearSphericalOptions, losses
from softsphere.functional import linear_spherical_loss, spherical_loss

OPERATORS = torchs_own("common_methods_invocations").op_db
# What reduction has replaced.
REPLACED = ("size_average", "reduce")
every_loss = pytest.mark.parametrize("name", losses.REGISTRY)


def cases(name: str) -> list[Any]:
    """PyTorch's inputs of an operator in float64, those without what reduction has replaced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = [
            case
            for info in OPERATORS
            if info.name == name and not info.variant_test_name
            for case in info.sample_inputs("cpu", torch.float64, requires_grad=True)
        ]
    return [case for case in found if not any(x in case.kwargs for x in REPLACED)]


CROSS_ENTROPY = cases("nn.functional.cross_entropy")
LINEAR = cases("nn.functional.linear_cross_entropy")


def refused(loss: losses.Loss, kwargs: dict[str, Any], target: Tensor) -> bool:
    """Whether the loss has no meaning for these options."""
    if kwargs.get("label_smoothing") and not loss.smoothable:
        return True
    weighed = kwargs.get("weight") is not None and target.is_floating_point()
    return weighed and isinstance(loss, losses.SquaredError)


def compare(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)
    if want.isfinite().all():
        slopes = [torch.autograd.grad(x.sum(), inputs, allow_unused=True) for x in (got, want)]
        torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)


def test_softmax_is_cross_entropy():
    assert CROSS_ENTROPY
    for case in CROSS_ENTROPY:
        target, *rest = case.args
        assert not rest
        got = spherical_loss(case.input, target, "softmax", **case.kwargs)
        compare(got, nn.functional.cross_entropy(case.input, target, **case.kwargs), [case.input])


@every_loss
def test_every_loss_takes_what_cross_entropy_takes(name):
    loss = losses.get(name)
    for case in CROSS_ENTROPY:
        (target,) = case.args
        if refused(loss, case.kwargs, target):
            with pytest.raises(ValueError, match="has no meaning"):
                spherical_loss(case.input, target, loss, **case.kwargs)
            continue
        got = spherical_loss(case.input, target, loss, **case.kwargs)
        want = nn.functional.cross_entropy(case.input, target, **case.kwargs)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert bool(got.isfinite().all()) == bool(want.isfinite().all())


def without_torchs_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in kwargs.items() if key != "options"}


@pytest.mark.skipif(not LINEAR, reason="this PyTorch has no F.linear_cross_entropy")
def test_softmax_of_a_layer_is_linear_cross_entropy():
    """K-dimensional losses among them."""
    assert any(case.args[0].dim() > 2 for case in LINEAR)
    for case in LINEAR:
        W, target, *rest = case.args
        assert not rest
        kwargs = without_torchs_options(case.kwargs)
        want = nn.functional.linear_cross_entropy(case.input, W, target, **kwargs)
        got = linear_spherical_loss(case.input, W, target, "softmax", **kwargs)
        compare(got, want, [case.input, W])


@pytest.mark.skipif(not LINEAR, reason="this PyTorch has no F.linear_cross_entropy")
@pytest.mark.parametrize("engine", ["auto", "dense", "chunked", "gram"])
@every_loss
def test_every_loss_of_a_layer_is_that_of_its_logits(name, engine):
    loss = losses.get(name)
    for case in LINEAR:
        W, target = case.args
        kwargs = without_torchs_options(case.kwargs)
        if refused(loss, kwargs, target):
            continue

        def call(W=W, target=target, kwargs=kwargs, case=case):
            options = LinearSphericalOptions(engine=engine)
            return linear_spherical_loss(case.input, W, target, loss, options=options, **kwargs)

        logits_needed = (
            W.dim() > 2
            or target.is_floating_point()
            or kwargs.get("label_smoothing")
            or not isinstance(loss, losses.Spherical)
        )
        if logits_needed and engine in ("chunked", "gram"):
            with pytest.raises((ValueError, TypeError), match="engine='dense'"):
                call()
            continue
        b = kwargs.pop("linear_bias", None)
        flat = None if b is None else b.flatten()
        o = nn.functional.linear(case.input, W.flatten(0, -2), flat)
        o = o.view(*case.input.shape[:-1], *W.shape[:-1])
        want = spherical_loss(o, target, loss, **kwargs)
        got = call(kwargs=case.kwargs and without_torchs_options(case.kwargs))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.filterwarnings("ignore")  # of PyTorch's, for what its check does
@pytest.mark.parametrize("form", ["logits", "linear"])
@pytest.mark.parametrize("name", ["taylor_softmax", "z_loss", "squared_error", "softmax"])
def test_composite_compliance(name, form):
    """No operation looks at the numbers of a subclass of Tensor, or writes it into another."""
    compliance = torchs_own("composite_compliance")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    W, target = (
        torch.randn(6, 5, dtype=torch.float64, generator=generator),
        torch.tensor([0, 2, 1, 2]),
    )
    weight = torch.linspace(0.5, 2, 5 if form == "logits" else 6).double()

    def on_logits(logits, target, weight):
        return spherical_loss(logits, target, name, weight=weight, ignore_index=1)

    def on_linear(hidden, W, target, weight):
        dense = LinearSphericalOptions(engine="dense")
        return linear_spherical_loss(hidden, W, target, name, weight=weight, options=dense)

    op, args = on_logits, (logits, target, weight)
    if form == "linear":
        op, args = on_linear, (logits, W, target, weight)
    same = torch.testing.assert_close
    compliance.check_with_mode(op, args, {}, same)
    compliance.check_all_permutations(op, args, {}, same)
    leaves = [
        x.clone().requires_grad_() if x.is_floating_point() and x is not weight else x for x in args
    ]
    compliance.check_backward_formula(op, leaves, {}, assert_equal_fn=same)
