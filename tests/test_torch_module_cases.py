"""Values, gradients and errors of every criterion on PyTorch's own cases (`_criterion_cases`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from _criterion_cases import (
    CRITERIA,
    DOUBLE,
    DTYPES,
    INFOS,
    SAME,
    SMALL,
    every_criterion,
    gradients,
    meaningless,
    reduced,
    suited,
)
from softsphere import SphericalLoss, losses


@pytest.mark.parametrize("case", DOUBLE)
def test_softmax_is_the_loss_of_pytorch(case):
    torchs, options, logits, target = DOUBLE[case]
    for loss in ("softmax", losses.get("softmax")):
        got = gradients(SphericalLoss(loss, **options), logits, target)
        want = gradients(nn.CrossEntropyLoss(**options), logits, target)
        if not want[0].isfinite().all():
            got, want = got[:1], want[:1]  # a mean of nothing has no gradient to compare
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)
        if torchs is nn.NLLLoss:
            nll = nn.NLLLoss(**options)(logits, target)
            torch.testing.assert_close(got[0], nll, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_criterion
def test_results_are_like_those_of_cross_entropy(name, dtype):
    """Their shape, dtype and device, and finite where PyTorch's are."""
    every = DOUBLE if dtype == torch.float64 else SMALL[dtype]
    for key, case in suited(name, every).items():
        want = gradients(nn.CrossEntropyLoss(**case.options), case.logits, case.target)
        got = gradients(CRITERIA[name](**case.options), case.logits, case.target)
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), key
        assert bool(got[0].isfinite().all()) == bool(want[0].isfinite().all()), key
        assert all(x.isfinite().all() for x in got[1:]) or not want[0].isfinite().all(), key


@every_criterion
def test_options_without_meaning_are_refused_by_name(name):
    for case in DOUBLE.values():
        option = meaningless(name, case)
        if option:
            with pytest.raises(ValueError, match=f"{option} has no meaning"):
                CRITERIA[name](**case.options)(case.logits, case.target)


@pytest.mark.parametrize("name", SAME)
def test_classes_are_what_their_names_are(name):
    for _, options, logits, target in DOUBLE.values():
        got = gradients(CRITERIA[name](**options), logits, target)
        want = gradients(SphericalLoss(SAME[name], **options), logits, target)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@every_criterion
def test_a_device_without_values(name):
    for case in suited(name, SMALL[torch.float64]).values():
        if case.options.keys() != {"reduction"}:
            continue
        logits, target = case.logits.to("meta"), case.target.to("meta")
        got = CRITERIA[name](**case.options).to("meta")(logits, target)
        want = nn.CrossEntropyLoss(**case.options).to("meta")(logits, target)
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)


@every_criterion
def test_gradients_are_those_of_differences(name):
    """Once and twice, for logits and class probabilities."""
    for key, (_, options, logits, target) in suited(name, SMALL[torch.float64]).items():
        criterion = CRITERIA[name](**options)
        if not criterion(logits, target).isfinite().all():
            continue
        inputs = [logits.clone().requires_grad_(), target.clone()]
        if target.is_floating_point():
            inputs[1].requires_grad_()
        assert torch.autograd.gradcheck(criterion, inputs, fast_mode=True), key
        if options.get("reduction") == "none":
            assert torch.autograd.gradgradcheck(criterion, inputs, fast_mode=True), key


@every_criterion
def test_strides_change_nothing(name):
    for _, options, logits, target in suited(name, reduced(DOUBLE, "none")).values():
        criterion = CRITERIA[name](**options)
        want = gradients(criterion, logits, target)
        apart = [torch.stack([x, x], -1)[..., 0] for x in (logits, target)]
        assert not apart[0].is_contiguous()
        got = gradients(criterion, *apart)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)


ERRORS = {
    f"{info.module_cls.__name__}: {error.error_regex}": error.module_error_input
    for info in INFOS
    for error in (info.module_error_inputs_func or (lambda *_, **__: []))(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=True
    )
}


@pytest.mark.parametrize("error", ERRORS)
@every_criterion
def test_what_pytorch_refuses_is_refused(name, error):
    made, given = ERRORS[error].constructor_input, ERRORS[error].forward_input
    with pytest.raises((ValueError, TypeError)):
        CRITERIA[name](*made.args, **made.kwargs)(*given.args, **given.kwargs)


def test_forward_by_the_names_of_pytorch():
    logits, target = torch.randn(2, 3), torch.tensor([0, 2])
    want = nn.CrossEntropyLoss()(input=logits, target=target)
    torch.testing.assert_close(SphericalLoss("softmax")(input=logits, target=target), want)


def test_label_smoothing_by_a_tensor():
    by_options(label_smoothing=torch.tensor(0.1))


def test_ignore_index_by_an_integer_of_numpy():
    by_options(ignore_index=pytest.importorskip("numpy").int64(2))


def by_options(**options: Any) -> None:
    logits, target = torch.randn(2, 3), torch.tensor([0, 2])
    want = nn.CrossEntropyLoss(**options)(logits, target)
    torch.testing.assert_close(SphericalLoss("softmax", **options)(logits, target), want)
