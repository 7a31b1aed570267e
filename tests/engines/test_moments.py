"""Second moments of rows that have much in common: no digit of what tells them apart is lost."""

from __future__ import annotations

import pytest
import torch

from _engines import ENGINES
from softsphere import LinearSphericalLoss, LinearSphericalOptions
from softsphere.engines.engine import Inputs
from softsphere.engines.moments import moments
from softsphere.functional import linear_spherical_loss

M, D, WIDTH = 24, 3000, 8
# The value of an input and of the rows of the weight that meet it; a bias takes their product off.
COMMON = {"1": (1.0, 1.0), "300": (1.0, 300.0), "1000": (1.0, 1000.0), "a row": (1000.0, 1.0)}


def problem(common, prior):
    torch.manual_seed(0)
    W, H = 0.1 * torch.randn(D, WIDTH), torch.randn(M, WIDTH)
    W[:, 0], H[:, 0] = COMMON[common]
    b = torch.full((D,), 1 - COMMON[common][0] * COMMON[common][1])
    pi = torch.rand(D).double() + 0.1 if prior else torch.ones(D).double()
    return H, W, b, torch.randint(D, (M,)), pi * D / pi.sum()


def taylor(o, t, pi):
    f = 1 + o + o * o / 2
    return ((f * pi).sum(1).log() - (f * pi).gather(1, t[:, None]).log().squeeze(1)).mean()


def bohning(o, t, pi):
    mu = (o * pi).sum(1, keepdim=True) / D
    spread = ((o - mu).square() * pi).sum(1)
    own = (o - mu).gather(1, t[:, None]).squeeze(1)
    return (torch.log(torch.tensor(float(D))) + spread / 4 - own - pi[t].log()).mean()


def z(o, t, pi):
    mu = (o * pi).sum(1, keepdim=True) / D
    sigma = (((o - mu).square() * pi).sum(1) / D).sqrt()
    own = (o - mu).gather(1, t[:, None]).squeeze(1) / sigma
    return torch.nn.functional.softplus(4 - own).mean()


EXACT = {"taylor_softmax": taylor, "bohning_bound": bohning, "z_loss": z}


def exactly(loss, H, W, b, t, pi):
    """The loss and its gradients from all outputs, in float64."""
    H, W, b = (x.double().requires_grad_() for x in (H, W, b))
    value = EXACT[loss](H @ W.mT + b, t, pi)
    return [value, *torch.autograd.grad(value, [H, W, b])]


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("loss", EXACT)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_common_part_of_rows_and_bias(engine, common, prior, loss):
    H, W, b, t, pi = problem(common, prior)
    want = exactly(loss, H, W, b, t, pi)
    leaves = [x.requires_grad_() for x in (H, W, b)]
    how = LinearSphericalOptions(engine=engine)
    value = linear_spherical_loss(
        H, W, t, loss, linear_bias=b, prior=pi if prior else None, options=how
    )
    got = [value, *torch.autograd.grad(value, leaves)]
    # The other engines know an output to the digits of the products that are summed to it.
    digits = 1 if engine == "gram" else COMMON[common][0] * COMMON[common][1]
    for x, y in zip(got, want, strict=True):
        assert error(x, y) < 1e-5 + 32 * torch.finfo(torch.float32).eps * digits


@pytest.mark.parametrize("loss", EXACT)
@pytest.mark.parametrize("common", COMMON)
def test_the_same_accumulated_over_batches(common, loss):
    H, W, b, t, _ = problem(common, prior=False)
    _, _, dW, db = exactly(loss, H, W, b, t, torch.ones(D).double())
    head = LinearSphericalLoss(WIDTH, D, loss)
    head.load_state_dict({"weight": W, "bias": b})
    with head.accumulate():
        for part in (slice(0, 8), slice(8, 24)):
            share = (part.stop - part.start) / M
            (head(H[part], t[part]) * share).backward()
    assert error(head.weight.grad, dW) < 1e-5 and error(head.bias.grad, db) < 1e-5


@pytest.mark.parametrize("order", ["as it is", "sorted", "in blocks"])
@pytest.mark.parametrize("far", [1e-4, 0.4])
def test_the_moments_do_not_depend_on_which_rows_give_the_shift(order, far):
    """A share of the rows is far from all others, and the mean is far from any row."""
    torch.manual_seed(0)
    W = torch.randn(5000, WIDTH)
    W[torch.rand(5000) < far] += 1000
    if order == "sorted":
        W = W[W[:, 0].argsort()]
    if order == "in blocks":
        W = W[W[:, 0].argsort()].view(50, 100, WIDTH).mT.reshape(5000, WIDTH)
    target = torch.zeros(1, 1).long()
    at = moments(Inputs(W[:1], W, None, target, None), True, 500, torch.float32)
    exact = W.double() - W.double().mean(0)
    assert error(at.S, exact.mT @ exact) < 1e-6
    assert error(at.mean, W.double().mean(0)) < 1e-6
