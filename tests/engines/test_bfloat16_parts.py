"""Products of float32 factors where the caller allows less than exact ones.

A CPU has no TF32, so factors are rounded by hand around PyTorch's own products. What these give,
in the engine that makes all outputs, is what the gram engine is compared with.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from _bytes import Bytes
from _engines import ENGINES, OPERATORS, SPHERICAL, layer, with_gradients
from _matrix_units import as_on_a_gpu, float32_may_be, float32_rounded_to, nearest, needs_triton
from softsphere.engines import bfloat16_parts, chunk_sums, gram, products
from softsphere.engines.dispatch import linear_statistics
from softsphere.engines.engine import Gradients, Inputs, Settings
from softsphere.engines.moments import moments
from softsphere.functional import linear_spherical_loss

# The bits of factors, and what the parts of a Gram matrix leave of its digits.
BITS = {"high": 10, "medium": 7}
LEFT = {"high": 2.0**-17, "medium": 2.0**-8}
GIVEN = ("nothing", "bias", "prior", "bias and prior")
M, D, WIDTH = 63, 507, 31


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def run(name, engine, H, W, b, target, prior):
    """The loss and its gradients."""
    loss = linear_spherical_loss(
        H,
        W,
        target,
        SPHERICAL[name],
        linear_bias=b,
        prior=prior,
        options=ENGINES[engine],
        reduction="sum",
    )
    return with_gradients(loss, H, W, b)


# Of a loss the kernels know only whether it sees a shift. Interpreted, they take long, and cut
# numbers off where a GPU rounds them to bfloat16, which two parts make up for.
INTERPRETED = [("taylor_softmax", "bias and prior", "high"), ("bohning_bound", "nothing", "high")]


@needs_triton
@pytest.mark.parametrize(
    ("name", "given", "precision", "kernels"),
    [
        *((name, given, p, False) for name in SPHERICAL for given in GIVEN for p in BITS),
        *((*case, True) for case in INTERPRETED),
    ],
)
@pytest.mark.once("it puts in products by hand")
def test_agreement_with_float64(monkeypatch, name, given, precision, kernels):
    """The error is no more than that of all outputs by PyTorch's own products."""
    H, W, b = layer(M, D, WIDTH, torch.float32, "bias" in given)
    prior = torch.rand(D) + 0.1 if "prior" in given else None
    target = torch.randint(D, (M,))
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (H, W, b)]
    want = run(name, "dense", *wide, target, prior)
    used = as_on_a_gpu(monkeypatch, kernels=kernels, float32=precision)
    with float32_rounded_to(BITS[precision]):
        theirs, ours = (run(name, x, H, W, b, target, prior) for x in ("dense", "gram"))
    for mine, other, x in zip(ours, theirs, want, strict=True):
        assert error(mine, x) <= 2 * error(other, x) + LEFT[precision] / 16
    assert used.count(torch.bfloat16) > D // 100


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("d", [7, 520])
@pytest.mark.once("it puts in products by hand")
def test_the_digits_of_moments_and_of_products_with_them(monkeypatch, d, size, prior, precision):
    """With blocks of columns and without; neither too small nor too large for bfloat16."""
    H, W, b = (x.detach() for x in layer(20, 90, d, torch.float32))
    pi = torch.rand(90) + 0.1 if prior else None
    x = Inputs(H, size * W, size * b, torch.zeros(20, 1).long(), pi)
    as_on_a_gpu(monkeypatch, float32=precision)
    at = moments(x, True, 40, torch.float32)
    rows = torch.cat([x.W, x.b.unsqueeze(1)], 1).double()
    pi = torch.ones(90).double() if pi is None else pi.double()
    mean = pi @ rows / pi.sum()
    S = (rows - mean).mT @ (pi.unsqueeze(1) * (rows - mean))
    assert error(at.S, S) < LEFT[precision]
    assert error(at.mean, mean) < LEFT[precision] / 4
    # the product has the digits of two parts at every precision
    assert error(products.times(H, S.float()[:, :d].mT), H.double() @ S[:d]) < LEFT["high"]


@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("precision", BITS)
@pytest.mark.once("it puts in products by hand")
def test_small_and_large_gradients(monkeypatch, precision, size):
    H, W, b = layer(M, D, WIDTH, torch.float32)
    target = torch.randint(D, (M,))
    as_on_a_gpu(monkeypatch, float32=precision)
    loss = linear_spherical_loss(
        H, W, target, "taylor_softmax", linear_bias=b, options=ENGINES["gram"]
    )
    one = torch.autograd.grad(loss, [H, W, b], retain_graph=True)
    other = torch.autograd.grad(loss, [H, W, b], torch.tensor(size))
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(y / size, x, rtol=1e-5, atol=1e-5 * x.abs().max().item())


def unsafe(case, d=16):
    """A column that the bias takes off again, or one row that is far from all others."""
    W, H, b = 0.1 * torch.randn(2000, d), 0.1 * torch.randn(24, d), torch.zeros(2000)
    if case == "one row":
        W[5], H = 100.0, H - H.mean(1, keepdim=True)
        return H, W, b
    H[:, 0] = 1
    W[:, 0] = case * torch.randn(2000)
    return H, W, -W[:, 0].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [0.1, 1.0, 30.0, "one row"])
@pytest.mark.parametrize("precision", BITS)
def test_sums_of_squares_where_outputs_cancel(monkeypatch, precision, case, dtype):
    """The error is that of all outputs, and the few parts of 2¹⁶ that the engine says.

    On a CPU, where half-precision tensors are converted to float32 first.
    """
    H, W, b = (x.to(dtype) for x in unsafe(case))
    target = torch.zeros(24, 1).long()

    def q(engine, *given):
        how = {"centred": False, "options": ENGINES[engine]}
        return linear_statistics(*given, target, None, **how).q

    float32_may_be(monkeypatch, precision)
    want = q("dense", H.double(), W.double(), b.double())
    with float32_rounded_to(BITS[precision]):
        ours, theirs = q("gram", H, W, b), q("dense", H.float(), W.float(), b.float())
    x = torch.cat([W, b.unsqueeze(1)], 1).double()
    h = torch.cat([H, torch.ones(24, 1)], 1).double()
    terms = h.square() @ (x - x.mean(0)).square().sum(0)
    bound = 2 * (theirs - want).abs().max() + 2.0**-15 * terms
    assert ((ours - want).abs() <= bound).all()


@pytest.mark.parametrize("precision", BITS)
def test_a_device_that_rounds_the_factors_of_float32_products(precision):
    """A GPU does at both precisions, a CPU with bfloat16 of its own at "medium", others never.

    Products of small matrices are exact as well.
    """
    H, W, b = unsafe(3.0, d=64)
    if H.device.type == "stand_in":
        pytest.skip("a CPU computes its products, and may round what no stand-in is said to round")
    H = H.repeat(4, 1)
    target, how = torch.zeros(len(H), 1).long(), {"centred": False}
    want = (H.double() @ W.double().mT + b.double()).square().sum(1)
    torch.set_float32_matmul_precision(precision)
    try:
        ours, theirs = (
            linear_statistics(H, W, b, target, None, **how, options=ENGINES[x]).q
            for x in ("gram", "dense")
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    assert error(ours, want) <= 3 * error(theirs, want) + 2e-2


@pytest.mark.once("lost digits are noticed on a CPU alone")
@pytest.mark.parametrize("case", [0.1, 0.2, 0.5, 1.0, "signs", "one row"])
@pytest.mark.parametrize("precision", BITS)
def test_lost_digits_are_noticed_at_every_precision(monkeypatch, precision, case):
    """signs: numbers half-way between two of bfloat16, from which parts are furthest."""
    H, W, b = unsafe(0.5 if case == "signs" else case)
    if case == "signs":
        W = 4 * W[:1000]
        W[:, 0] = 1 + 2.0**-8
        W[::2, 0] *= -1
        b = -W[:, 0].clone()
    float32_may_be(monkeypatch, precision)
    how = Settings(False, None, 100, torch.float32, False)
    with float32_rounded_to(BITS[precision], outside=False):
        q = gram.guarded_statistics(Inputs(H, W, b, torch.zeros(24, 1).long(), None), how)[1]
    want = (H.double() @ W.double().mT + b.double()).square().sum(1)
    assert ((q - want).abs() / want).max() < 1e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", BITS)
def test_what_is_not_finite_stays_so(monkeypatch, precision, bad):
    H, W, b = layer(5, 90, 6, torch.float32)
    target = torch.arange(5).unsqueeze(1)
    # the mean of the outputs, which is taken off, would carry it into q by itself
    how = {"centred": True, "options": ENGINES["gram"]}
    float32_may_be(monkeypatch, precision)

    def q(H, W, b):
        return linear_statistics(H, W, b, target, None, **how).q.isfinite()

    H, W, b = (x.detach() for x in (H, W, b))
    assert q(H, W, b).all()
    for x in (W, b):
        kept, x[3] = x[3].clone(), bad
        assert not q(H, W, b).any()
        x[3] = kept
    H[2, 1] = bad
    assert q(H, W, b).tolist() == [True, True, False, True, True]


def flops_forward(d, D, m):
    x = Inputs(torch.randn(m, d), torch.randn(D, d), None, torch.zeros(m, 1).long(), None)
    with FlopCounterMode(display=False) as counter:
        gram._forward(x, Settings(True, None, 100, torch.float32, False))
    return counter.get_total_flops()


def test_the_products_of_a_gram_matrix_are_counted(monkeypatch):
    """Two at "high" and one at "medium"; where they are symmetric by blocks, 1.5 and 0.5."""
    found = {}
    monkeypatch.setattr(chunk_sums, "_BLOCK_ON_GPU", chunk_sums._BLOCK)
    for precision in ("highest", *BITS):
        float32_may_be(monkeypatch, precision)
        for d in (64, 1024):
            more, less = (flops_forward(d, D, 1) for D in (400, 200))
            found[precision, d] = (more - less) / (2 * 200 * d * d)
    assert found["highest", 64] == 1 and found["highest", 1024] == 0.625
    # beside them, sums of rows are products of 8 rows
    for d in (64, 1024):
        assert found["medium", d] == found["highest", d] + 8 / d
        assert found["high", d] == found["medium", d] + 1 + 8 / d <= 2 + 16 / d


def test_the_products_of_rows_are_counted(monkeypatch):
    """Three products with S, in pieces of the rows or at once."""
    S, one = torch.randn(32, 32), 2 * 700 * 32 * 32
    for precision, products_made in (("highest", 1), ("high", 3), ("medium", 3)):
        float32_may_be(monkeypatch, precision)
        for at_once in (1 << 24, 1):
            monkeypatch.setattr(products, "_AT_ONCE", at_once)
            with FlopCounterMode(display=False) as counter:
                products.times(torch.randn(700, 32), S)
            assert counter.get_total_flops() == products_made * one


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.once("it puts in products by hand")
def test_memory_is_that_of_a_chunk(monkeypatch, precision):
    """The parts of a chunk take no more than its copy in float32, and D adds nothing."""
    as_on_a_gpu(monkeypatch, float32=precision)
    m, d, chunk = 20, 64, 100
    how, most = Settings(True, None, chunk, torch.float32, False), []
    for classes in (400, 1000):
        H, W, b = (x.detach() for x in layer(m, classes, d, torch.float32))
        x = Inputs(H, W, b, torch.zeros(m, 1).long(), None)
        with Bytes(*x[:4]) as forward:
            kept = gram._forward(x, how)[3:]
        g = Gradients(torch.ones(m), torch.ones(m), torch.ones(m, 1))
        with Bytes(*x[:4], *kept, *g) as backward:
            dW = gram._backward(g, x, kept, how, (True, True, True))[1]
        # the gradient of b is summed in float64
        most.append((forward.most, backward.most - 4 * dW.numel() - 8 * classes))
    assert most[0] == most[1]
    # the parts, and without a kernel the rows less their shift and what they leave; S and its sums
    assert max(most[0]) < 3 * 4 * chunk * d + 8 * 4 * d * d
    room = bfloat16_parts.parts_room(x.W, chunk, {"high": 2, "medium": 1}[precision])
    assert room.untyped_storage().nbytes() <= 4 * chunk * d


def test_rows_in_pieces_are_those_at_once(monkeypatch):
    H, S = torch.randn(2000, 8), torch.randn(8, 8)
    float32_may_be(monkeypatch, "high")
    want = products.times(H, S)
    monkeypatch.setattr(products, "_AT_ONCE", 1)
    with Bytes(H, S) as meter:
        got = products.times(H, S)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    # beside the result, tensors of 256 rows
    assert meter.most < 4 * 8 * (2000 + 6 * 256)
    assert products.times(H[:0], S).shape == (0, 8)


def test_a_compiled_layer_follows_the_setting(monkeypatch):
    """It is read when the layer runs, without a break of the graph."""
    H, W, b = layer(9, 90, 8, torch.float32)
    target = torch.randint(90, (9,))

    def loss(H, W, b):
        return linear_spherical_loss(
            H, W, target, "taylor_softmax", linear_bias=b, options=ENGINES["gram"]
        )

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for precision in ("highest", *BITS):
        float32_may_be(monkeypatch, precision)
        got, want = (with_gradients(f(H, W, b), H, W, b) for f in (compiled, loss))
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


def test_numbers_are_rounded_to_the_nearest():
    x = torch.randn(1000)
    assert torch.equal(nearest(x, 7), x.bfloat16().float())
    assert torch.equal(nearest(nearest(x, 7), 10), nearest(x, 7))
    assert OPERATORS and error(nearest(x, 10), x) < 2.0**-11
