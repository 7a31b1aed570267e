"""Criteria as modules: copies, states, moves and options, on PyTorch's own cases."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from _criterion_cases import (
    CRITERIA,
    FEW,
    INFOS,
    every_criterion,
    gradients,
    suited,
)
from softsphere import SphericalLoss, TaylorSoftmaxLoss, losses


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
    """Their defaults, their attributes, and the representation of the module."""
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


@every_criterion
def test_arguments_by_position_are_those_of_cross_entropy(name):
    """size_average and reduce among them, which PyTorch has deprecated."""
    theirs = list(inspect.signature(nn.CrossEntropyLoss).parameters)
    ours = inspect.signature(CRITERIA[name]).parameters.values()
    assert [x.name for x in ours if x.kind is x.POSITIONAL_OR_KEYWORD] == theirs
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        given = (torch.rand(3), size_average, 2, reduce, "sum")
        if size_average is reduce is None:
            torchs, criterion = nn.CrossEntropyLoss(*given), CRITERIA[name](*given)
        else:
            with pytest.warns(UserWarning, match="size_average and reduce"):
                torchs = nn.CrossEntropyLoss(*given)
            with pytest.warns(UserWarning, match="size_average and reduce are deprecated") as told:
                criterion = CRITERIA[name](*given)
            assert criterion.reduction == torchs.reduction
            assert len(told) == 1
        for key in torchs.__constants__:
            assert getattr(criterion, key) == getattr(torchs, key)
        assert criterion(logits, target).isfinite().all()


def test_a_wrong_deprecated_argument_is_told():
    with pytest.raises(TypeError, match="size_average must be True or False, got 1"):
        TaylorSoftmaxLoss(None, 1)
