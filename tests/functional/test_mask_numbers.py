"""Numbers by which other libraries mask classes, which these losses cannot take for a mask."""

from __future__ import annotations

import pytest
import torch

from _cases import CASES
from softsphere import SphericalLoss, TaylorSoftmaxLoss, losses
from softsphere.functional import log_prob, spherical_loss, taylor_softmax

ALL = sorted(CASES)
SOFTMAX = ("softmax", "soft_margin")
TARGET = torch.tensor([0, 1])
KEPT = torch.tensor([True, True, True, True, False])
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_loss = pytest.mark.parametrize("name", [name for name in ALL if name not in SOFTMAX])


def marked(number: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    return logits.masked_fill(~KEPT, number).requires_grad_()


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@every_loss
def test_the_smallest_number_of_a_dtype_is_no_mask(name, dtype, finite):
    number = torch.finfo(dtype).min if finite else -torch.inf
    loss, o = CASES[name][0], marked(number, dtype)
    calls = [lambda: spherical_loss(o, TARGET, loss), lambda: SphericalLoss(loss)(o[0], TARGET[0])]
    if loss.smoothable:
        calls.append(lambda: spherical_loss(o, TARGET, loss, label_smoothing=0.1))
    if loss.normalised:
        calls += [lambda: log_prob(o, loss), lambda: SphericalLoss(loss).predict(o)]
    for call in calls:
        with pytest.raises(ValueError, match=r"finite logits for this loss, got .*pass mask=…"):
            call()
    assert spherical_loss(o, TARGET, loss, mask=KEPT).isfinite()


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("number", [-1e30, -1e20])
@pytest.mark.parametrize("name", losses.REGISTRY)
def test_one_very_negative_number_in_several_places_is_no_mask(name, number):
    loss = losses.get(name)
    if isinstance(loss, losses.OnLogits):
        pytest.skip("its values are finite there")
    with pytest.raises(ValueError, match=r"got -1e\+\d0, whose square overflows"):
        spherical_loss(marked(number), TARGET, loss)


@pytest.mark.once("values are checked on a CPU alone")
def test_minus_infinity_of_float16():
    with pytest.raises(ValueError, match="got −inf"):
        spherical_loss(marked(-torch.inf, torch.float16), TARGET, "taylor_softmax")


@pytest.mark.parametrize("least", [None, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("name", losses.REGISTRY)
def test_a_model_that_diverges_has_a_loss_that_is_not_finite(name, least):
    """It is not an error, so that a training loop can end the run."""
    o = 1e30 * torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    if least is not None:
        o[:, 3] = least
    if isinstance(losses.get(name), losses.OnLogits):
        return
    assert not spherical_loss(o, TARGET, name, reduction="none").isfinite().any()


@pytest.mark.once("squares that overflow are noticed on a CPU alone")
def test_probabilities_of_large_logits_do_not_overflow():
    for order in (2, 4):
        p = taylor_softmax(torch.tensor([[0.0, 1.0, 1e20]]), order=order)
        torch.testing.assert_close(p, torch.tensor([[0.0, 0.0, 1.0]]))
    assert TaylorSoftmaxLoss().predict(torch.tensor([[0.0, 2e25, -1e25]])).item() == 1
    assert taylor_softmax(torch.tensor([0.0, torch.inf])).isnan().any()
