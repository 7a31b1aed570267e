"""PyTorch's own cases for nn.CrossEntropyLoss and nn.NLLLoss, for every criterion of the package.

The cases are read from the installed torch, so that a new one joins by itself; so does a new loss.
The log-probabilities of nn.NLLLoss are logits whose cross-entropy is that loss.

Left out of PyTorch's own: memory formats and devices that are not there; size_average and reduce,
which reduction has replaced, and arguments by place, which no criterion here takes;
nn.LinearCrossEntropyLoss, which is a layer.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
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
    """Those that are reduced in one way."""
    return {
        name: case
        for name, case in among.items()
        if case.options.get("reduction", "mean") == reduction
    }


# What is the same for every shape and reduction is asked of these.
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


# --- values ------------------------------------------------------------------------------------


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


# --- gradients ---------------------------------------------------------------------------------


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


# --- as modules --------------------------------------------------------------------------------


def through_a_file(x: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: through_a_file(x, weights_only=False),
}


@pytest.mark.parametrize("way", COPIES)
@every_criterion
def test_copies_compute_the_same(name, way):
    for _, options, logits, target in suited(name, FEW).values():
        criterion = CRITERIA[name](**options)
        other = COPIES[way](criterion)
        assert repr(other) == repr(criterion)
        got, want = (gradients(x, logits, target) for x in (other, criterion))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@every_criterion
def test_states_are_those_of_cross_entropy(name):
    """The class weights, and nothing where there are none."""
    for _, options, _, _ in suited(name, FEW).values():
        criterion, torchs = CRITERIA[name](**options), nn.CrossEntropyLoss(**options)
        state = through_a_file(criterion.state_dict(), weights_only=True)
        torch.testing.assert_close(dict(state), dict(torchs.state_dict()), rtol=0, atol=0)
        if options.get("weight") is not None:
            fresh = CRITERIA[name](**{**options, "weight": torch.zeros(3, dtype=torch.float64)})
            fresh.load_state_dict(torchs.state_dict())
            assert fresh.weight.equal(options["weight"])


@every_criterion
def test_moves_between_dtypes(name):
    for _, options, logits, target in suited(name, FEW).values():
        criterion = CRITERIA[name](**options)
        soft = target.is_floating_point()
        narrow = criterion.float()(logits.float(), target.float() if soft else target)
        assert narrow.dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in criterion.state_dict().values())
        wide = criterion.double()(logits, target)
        assert wide.dtype == torch.float64
        assert all(x.dtype == torch.float64 for x in criterion.state_dict().values())
        rounded = {k: v.float().double() if k == "weight" else v for k, v in options.items()}
        torch.testing.assert_close(
            wide, CRITERIA[name](**rounded)(logits, target), rtol=0, atol=0, equal_nan=True
        )


@every_criterion
def test_evaluation_is_training(name):
    """As the cases say of PyTorch's losses, except that a soft margin is for training alone."""
    assert not any(info.train_and_eval_differ for info in INFOS)
    for _, options, logits, target in suited(name, FEW).values():
        criterion = CRITERIA[name](**options)
        train, plain = (x(logits, target) for x in (criterion, copy.deepcopy(criterion).eval()))
        if isinstance(criterion.loss, losses.SoftMarginSoftmax):
            train = SphericalLoss("softmax", **options)(logits, target)
        torch.testing.assert_close(plain, train, equal_nan=True)


@every_criterion
def test_options_are_those_of_cross_entropy(name):
    """Their defaults, what can be read of them, and what is printed."""
    theirs = inspect.signature(nn.CrossEntropyLoss).parameters
    wanted = {k: x.default for k, x in theirs.items() if k not in ("size_average", "reduce")}
    ours = inspect.signature(CRITERIA[name]).parameters
    assert {k: ours[k].default for k in wanted} == wanted
    for _, options, _, _ in suited(name, FEW).values():
        criterion, torchs = CRITERIA[name](**options), nn.CrossEntropyLoss(**options)
        for key in torchs.__constants__:
            assert getattr(criterion, key) == getattr(torchs, key)
            assert f"{key}={getattr(criterion, key)!r}" in repr(criterion)
        assert ("weight=" in repr(criterion)) == ("weight" in options)


# --- what is refused ---------------------------------------------------------------------------

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
