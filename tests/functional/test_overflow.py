"""Where the squares of outputs overflow, neither the loss nor its gradients are finite."""

from __future__ import annotations

import pytest
import torch

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
    SphericalLoss,
)
from softsphere.losses import REGISTRY, Normalised, Spherical
from softsphere.matrix import SingularStepError
from softsphere.optim import FactoredSGD

d, D, m = 4, 40, 6
TARGET = torch.tensor([3, 0, 7, 39, 12, 7])
CLUSTERS = torch.arange(D) % 4
SPHERICAL = [name for name, kind in REGISTRY.items() if issubclass(kind, Spherical)]
LAYERS = {
    "factored": lambda loss: FactoredSphericalLoss(d, D, loss),
    **{
        engine: lambda loss, engine=engine: LinearSphericalLoss(
            d, D, loss, options=LinearSphericalOptions(engine=engine)
        )
        for engine in ("auto", "dense", "chunked", "gram")
    },
    **{
        f"clusters, {engine}": lambda loss, engine=engine: ClusteredLoss(
            d, D, CLUSTERS, leaf=loss, engine=engine
        )
        for engine in ("logits", "gram", "factored")
    },
}
CASES = [
    (layer, loss)
    for layer in LAYERS
    for loss in SPHERICAL
    if not layer.startswith("clusters") or issubclass(REGISTRY[loss], Normalised)
]
every_case = pytest.mark.parametrize(("layer", "loss"), CASES)
sizes = pytest.mark.parametrize("size", [1e19, 1e20, 1e25])


def made(layer, loss):
    torch.manual_seed(0)
    head = LAYERS[layer](loss)
    hidden = torch.randn(m, d)
    return head, hidden


@sizes
@every_case
def test_no_gradient_is_finite_where_the_loss_is_not(layer, loss, size):
    head, hidden = made(layer, loss)
    hidden[0] *= size
    hidden.requires_grad_()
    value = head(hidden, TARGET)
    if value.isfinite():
        assert size == 1e19  # outputs differ by some factor
        return
    value.backward()
    assert not hidden.grad[0].isfinite().any()
    assert not head.weight.grad.norm().isfinite()


# Of the others even a gradient of 0 meets a derivative that is NaN, as documented for the Z-loss.
@pytest.mark.parametrize(
    ("layer", "loss"), [case for case in CASES if case[1] not in ("z_loss", "bouchard_bound")]
)
def test_a_row_that_is_ignored_may_be_large(layer, loss):
    head, hidden = made(layer, loss)
    target = TARGET.clone()
    target[0] = -100
    hidden[0] *= 1e25
    hidden.requires_grad_()
    value = head(hidden, target)
    value.backward()
    assert value.isfinite()
    assert not hidden.grad[0].any() and hidden.grad.isfinite().all()
    assert head.weight.grad.norm().isfinite()


@pytest.mark.once("a GPU refuses a step without a word, and reports it later")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("loss", SPHERICAL)
def test_the_step_of_a_loss_that_overflows_is_refused(loss, momentum):
    head, hidden = made("factored", loss)
    optimizer = FactoredSGD(head.parameters(), 1.0, momentum)
    for size in (1.0, 1e20, 1.0):
        before = head.dense()
        optimizer.zero_grad()
        head(hidden * torch.tensor([size, 1, 1, 1, 1, 1]).unsqueeze(1), TARGET).backward()
        if size == 1:
            optimizer.step()
            continue
        with pytest.raises(SingularStepError, match="not finite"):
            optimizer.step()
        assert torch.equal(head.dense(), before)
    assert head.dense().isfinite().all()


@pytest.mark.parametrize("way", ["indices", "label smoothing", "probabilities", "values"])
@pytest.mark.parametrize("loss", SPHERICAL)
def test_criteria_have_no_finite_gradient_either(loss, way):
    torch.manual_seed(0)
    smoothing = 0.1 if way == "label smoothing" and loss != "z_loss" else 0.0
    criterion = SphericalLoss(loss, label_smoothing=smoothing)
    logits = torch.randn(m, D)
    logits[0] *= 1e20
    logits.requires_grad_()
    if way == "values":
        given = torch.stack([TARGET, (TARGET + 1) % D], 1), torch.rand(m, 2)
    else:
        given = (torch.softmax(torch.randn(m, D), -1) if way == "probabilities" else TARGET,)
    value = criterion(logits, *given)
    value.backward()
    assert not value.isfinite()
    assert not logits.grad[0].isfinite().any() and logits.grad[1:].isfinite().all()


def test_the_gradient_of_softmax_is_that_of_pytorch_where_a_target_is_left_out():
    """A bias of −∞ makes the loss infinite, and leaves the gradients finite."""
    torch.manual_seed(0)
    head = SampledSoftmaxLoss(d, D).eval()
    with torch.no_grad():
        head.bias[3] = -torch.inf
    hidden = torch.randn(m, d, requires_grad=True)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    got, want = head(hidden, TARGET), torch.nn.functional.cross_entropy(logits, TARGET)
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(x, hidden)[0] for x in (got, want)]
    torch.testing.assert_close(*slopes)
