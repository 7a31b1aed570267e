"""Probabilities as `F.softmax` gives them: dimensions, dtypes and one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from _torch_cases import torchs_own
from softsphere import SphericalLoss, TaylorSoftmaxLoss, losses
from softsphere.functional import (
    log_prob,
    log_spherical_softmax,
    log_taylor_softmax,
    spherical_softmax,
    taylor_softmax,
)

FUNCTIONS = {
    "taylor_softmax": taylor_softmax,
    "log_taylor_softmax": log_taylor_softmax,
    "spherical_softmax": spherical_softmax,
    "log_spherical_softmax": log_spherical_softmax,
    "softmax by log_prob": lambda x, dim=-1, **options: log_prob(x, "softmax", dim, **options),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
HALVES = [torch.bfloat16, torch.float16]


def operator_cases(name: str) -> list:
    """PyTorch's own inputs of an operator, in float64."""
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for info in torchs_own("common_methods_invocations").op_db:
            if info.name == name:
                found += info.sample_inputs("cpu", torch.float64)
    return found


def test_softmax_is_that_of_pytorch_on_its_own_cases():
    cases = operator_cases("log_softmax")
    assert cases
    for case in cases:
        dim, *rest = case.args
        got = log_prob(case.input, "softmax", dim, **case.kwargs)
        want = torch.log_softmax(case.input, dim, *rest, **case.kwargs)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, equal_nan=True)


@every_function
def test_every_function_takes_what_softmax_takes(name):
    for case in operator_cases("softmax"):
        got = FUNCTIONS[name](case.input, case.args[0], **case.kwargs)
        want = torch.softmax(case.input, *case.args, **case.kwargs)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if got.numel():
            p = got.exp() if "log" in name else got
            total = p.sum(case.args[0])
            torch.testing.assert_close(total, torch.ones_like(total))


@every_function
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_a_dimension_that_is_not_given_is_that_of_softmax(name, shape):
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        got = FUNCTIONS[name](x, None)
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        want = nn.functional.softmax(x)
    total = (got.exp() if "log" in name else got).sum(0 if len(shape) in (0, 1, 3) else 1)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert got.shape == want.shape


@every_function
def test_the_warning_points_at_the_caller(name):
    if "log_prob" in name:
        pytest.skip("it is called by a function of this file")
    with pytest.warns(UserWarning, match="Implicit") as caught:
        FUNCTIONS[name](torch.zeros(2), None)
    assert caught[0].filename == __file__


@every_function
def test_empty_and_scalar_inputs(name):
    function = FUNCTIONS[name]
    for shape, dim in (((0,), 0), ((3, 0), 1), ((3, 0), 0), ((0, 3), 1)):
        assert function(torch.zeros(shape), dim).shape == shape
    for dim in (0, -1):
        assert function(torch.tensor(2.0), dim) == (0.0 if "log" in name else 1.0)
    with pytest.raises(ValueError, match="dim must be a dimension"):
        function(torch.tensor(2.0), 1)


@every_function
def test_the_dtype_is_converted_to_first(name):
    function = FUNCTIONS[name]
    x = torch.tensor([1.0, 2.5, 3.0])
    got = function(x.half(), dtype=torch.float64)
    assert got.dtype == torch.float64
    assert torch.equal(got, function(x.double()))
    assert torch.equal(
        function(torch.tensor([1, 2, 3]), dtype=torch.float32),
        function(torch.tensor([1.0, 2.0, 3.0])),
    )
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        function(x, dtype=torch.int64)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("function", [taylor_softmax, spherical_softmax])
def test_half_precision_is_rounded_once(function, dtype):
    """Half a unit in the last place of the result, as F.softmax has it; once it was 16 times."""
    x = torch.cat([torch.randn(50, 1000), 40 * torch.randn(50, 1000)]).to(dtype)
    got, want = function(x).double(), function(x.double())
    unit = torch.finfo(dtype).eps * want.clamp_min(torch.finfo(dtype).tiny)
    assert ((got - want).abs() <= 0.502 * unit).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["taylor_softmax", "higher_taylor_softmax", "softmax"])
def test_near_outputs_are_ranked_before_they_are_rounded(name, dtype):
    """The log-probabilities of 3.0 and of the next number (3.015625) round to one in bfloat16."""
    criterion = SphericalLoss(name)
    row = torch.zeros(1, 50_257, dtype=dtype)
    row[0, 7], row[0, 9] = 3.0, 3.0 + 2 * torch.finfo(dtype).eps
    assert criterion.log_prob(row)[0, 7] == criterion.log_prob(row)[0, 9]
    assert criterion.predict(row).item() == 9
    assert criterion.topk(row, 2).indices.tolist() == [[9, 7]]
    assert criterion.topk(row, 2).values.dtype == dtype


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_predictions_in_half_precision_are_those_in_float64(name):
    criterion = SphericalLoss(name)
    logits = torch.randn(20, 50_257, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = criterion.scores(logits.double())
    best = criterion.predict(logits)
    assert torch.equal(scores.gather(1, best[:, None]), scores.max(1, keepdim=True).values)


def test_nan_ranks_last():
    logits = torch.tensor([[torch.nan, 0.0, 1.0], [0.0, torch.nan, -3.0]])
    assert SphericalLoss("z_loss").predict(logits).tolist() == [2, 0]
    assert SphericalLoss("z_loss").topk(logits, 3).indices[:, 2].tolist() == [0, 1]


def test_topk_takes_what_is_an_integer():
    numpy = pytest.importorskip("numpy")
    criterion = TaylorSoftmaxLoss()
    for k in (numpy.int64(2), torch.tensor(2)):
        assert criterion.topk(torch.zeros(2, 3), k).indices.shape == (2, 2)
    with pytest.raises(ValueError, match="k must be from 1 to num_classes = 3, got 4"):
        criterion.topk(torch.zeros(2, 3), 4)
    with pytest.raises(TypeError, match="k must be an integer"):
        criterion.topk(torch.zeros(2, 3), 2.0)


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_a_dimension_may_be_any_integer(kind):
    o = torch.randn(2, 3)
    dim = torch.tensor(1) if kind == "tensor" else pytest.importorskip("numpy").int64(1)
    assert torch.equal(taylor_softmax(o, dim), taylor_softmax(o, 1))
    with pytest.raises(TypeError, match="dim must be an integer, got True"):
        taylor_softmax(o, True)


def test_an_implicit_dimension_compiles_to_one_graph():
    torch.compiler.reset()
    o = torch.randn(2, 3)
    whole = torch.compile(lambda o: taylor_softmax(o, None), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(o), taylor_softmax(o, 1))
