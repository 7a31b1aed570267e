"""The engines that are operators: registered, compiled, and as cheap as they say."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from _engines import ENGINES, OPERATORS, Largest, flops_of_calls, layer
from softsphere import checks
from softsphere.engines import chunk_sums
from softsphere.engines.engine import Gradients, Inputs, Settings
from softsphere.functional import linear_spherical_loss


def arguments(m=5, D=63, d=4, K=2, bias=True, prior=True, centred=False, dtype=None):
    """What an engine is given."""
    torch.manual_seed(0)
    H, W, b = layer(m, D, d, dtype or torch.float64, bias)
    pi = checks.prior(torch.rand(D).double() + 0.2) if prior else None
    x = Inputs(H, W, b, torch.randint(D, (m, K)), pi)
    return x, Settings(centred, 2, 20, torch.float64, False)


def upstream(x):
    given = torch.randn(len(x.H)), torch.randn(len(x.H)), torch.randn(x.target.shape)
    return Gradients(*(g.double() for g in given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, bias, dtype):
    engine = OPERATORS[name]
    x, how = arguments(bias=bias, prior=bias, centred=bias, dtype=dtype)
    torch.library.opcheck(engine.forward_operator, (*x, *how))
    x = Inputs(*(None if t is None else t.detach() for t in x))
    kept = engine.forward(x, how)[3:]
    args = (*upstream(x), *x, *kept, *how, [True, True, bias])
    torch.library.opcheck(engine.backward_operator, args)


@pytest.mark.parametrize("loss", ["taylor_softmax", "z_loss"])
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_it_compiles_whole(engine, loss):
    H, W, b = layer(5, 123, 4)
    target = torch.tensor([0, 7, 7, -100, 122])

    prior = torch.ones(123)

    def call(H, W, b, target):
        return linear_spherical_loss(
            H, W, target, loss, linear_bias=b, prior=prior, options=ENGINES.get(engine)
        )

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [[x, *torch.autograd.grad(x, [H, W, b])] for x in (
        call(H, W, b, target), compiled(H, W, b, target)
    )]  # fmt: skip
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def both_ways(name, frozen=False, **sizes):
    """Runs an operator's implementation forwards and backwards."""
    x, how = arguments(**sizes)
    engine, needs = OPERATORS[name], (True, not frozen, x.b is not None and not frozen)
    with torch.no_grad():
        engine.backward(upstream(x), x, engine.forward(x, how)[3:], how, needs)


def flops(name, **sizes):
    with FlopCounterMode(display=False) as counter:
        both_ways(name, **sizes)
    return counter.get_total_flops()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_work_of_gram_for_the_classes_does_not_grow_with_the_rows(bias, centred):
    d, few, many = 8, 100, 300

    def slope(m):
        more, less = (
            flops("gram", m=m, D=D, d=d, bias=bias, prior=False, centred=centred)
            for D in (many, few)
        )
        return (more - less) / (many - few)

    assert slope(1) == slope(100)
    # two products of each row of W with d × d; each d more is a matrix by a vector
    assert 4 * d * d <= slope(1) <= 4 * d * d + 8 * d


def test_a_frozen_weight_costs_gram_nothing_backwards():
    sizes = {"bias": False, "prior": False, "frozen": True}
    assert flops("gram", m=7, D=300, d=8, **sizes) == 2 * (300 + 7) * 8 * 8


@pytest.fixture
def backward_flops():
    with flops_of_calls(OPERATORS.values(), "backward") as found:
        yield found


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_gradient_that_is_not_asked_for_is_not_computed(name, leaf, backward_flops):
    """torch.autograd.grad of H alone costs what it costs with a frozen weight."""
    for frozen in (True, False):
        x, how = arguments(m=9, D=90, d=8, bias=True, prior=False)
        H, W, b = x.H, x.W.detach() if frozen else x.W, x.b
        H, W, b = (t if leaf or not t.requires_grad else 1 * t for t in (H, W, b))
        s, q, c = OPERATORS[name](Inputs(H, W, b, x.target, None), how)
        total = s.sum() + q.sum() + c.sum()
        torch.autograd.grad(total, H, retain_graph=True)
        if leaf:
            total.backward(inputs=[H])
        else:
            torch.autograd.grad(total, [H, b], retain_graph=True)
            torch.autograd.grad(total, [H] if frozen else [H, W, b])
    if leaf:
        assert len(set(backward_flops)) == 1
    else:
        alone, with_bias, _, *rest = backward_flops
        assert rest[:2] == [alone, with_bias] and rest[2] > with_bias >= alone


def test_the_work_of_gram_where_products_are_symmetric(monkeypatch):
    monkeypatch.setattr(chunk_sums, "_BLOCK_ON_GPU", chunk_sums._BLOCK)
    d, D, m = 1024, 300, 40
    full = flops("gram", m=m, D=D, d=d, bias=False, prior=False)
    assert full < 3.4 * (D + m) * d * d


def test_the_work_of_chunked():
    m, D, d = 20, 300, 16
    assert flops("chunked", m=m, D=D, d=d, bias=False, prior=False) == 8 * m * D * d


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_of_rows_by_classes_is_made(name, bias, centred, dtype):
    m, D, d = 9, 400, 4
    with Largest() as largest:
        both_ways(name, m=m, D=D, d=d, bias=bias, centred=centred, dtype=dtype)
    assert largest.numel <= D * d  # the gradient by W itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_copy_of_the_weight_is_made(name, dtype):
    """Where W wants no gradient, nothing is as large as W."""
    x, how = arguments(m=9, D=400, d=4, centred=True, dtype=dtype)
    engine = OPERATORS[name]
    with torch.no_grad(), Largest() as largest:
        engine.backward(upstream(x), x, engine.forward(x, how)[3:], how, (True, False, False))
    assert largest.numel <= 400  # as b


@pytest.mark.parametrize("name", OPERATORS)
def test_deterministic_is_the_same_on_a_cpu(name):
    x, how = arguments()
    one, two = (OPERATORS[name](x, how._replace(deterministic=flag)) for flag in (False, True))
    one, two = (torch.autograd.grad(y[1].sum() + y[2].sum(), x[:3]) for y in (one, two))
    for x, y in zip(one, two, strict=True):
        assert torch.equal(x, y)
