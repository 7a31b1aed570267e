"""The gram engine where columns of the weight and the bias cancel: its lost digits are noticed."""

from __future__ import annotations

import pytest
import torch

from softsphere import LinearSphericalLoss, LinearSphericalOptions
from softsphere.engines import chunked, gram
from softsphere.engines.engine import Inputs, Settings
from softsphere.engines.gram import GRAM
from softsphere.functional import linear_spherical_loss

D, WIDTH, ROWS = 20_000, 32, 64


def cancelling(a):
    """A column of the weight that the bias takes off again, different for each class."""
    generator = torch.Generator().manual_seed(0)
    W = 0.1 * torch.randn(D, WIDTH, generator=generator)
    H = 0.1 * torch.randn(ROWS, WIDTH, generator=generator)
    column = torch.randn(D, generator=generator)
    W[:, 0], H[:, 0] = a * column, 1
    return H, W, -a * column, torch.arange(ROWS)


def alternating(a):
    H, W, _, t = cancelling(0)
    W[::2, 0], W[1::2, 0] = a, -a
    return H, W, -W[:, 0].clone(), t


def one_large_class(a):
    H, W, b, t = cancelling(0)
    W[5] = a
    H -= H.mean(1, keepdim=True)
    return H, W, 0 * b, t


def squared(o, t):
    own = o.gather(1, t[:, None]).squeeze(1)
    return (o.square().sum(1) - 2 * own + 1).mean()


def taylor(o, t):
    f = 1 + o + o * o / 2
    return (f.sum(1).log() - f.gather(1, t[:, None]).squeeze(1).log()).mean()


def z(o, t):
    o = (o - o.mean(1, keepdim=True)) / o.std(1, correction=0, keepdim=True)
    return torch.nn.functional.softplus(4 - o.gather(1, t[:, None])).mean()


EXACT = {"squared_error": squared, "taylor_softmax": taylor, "z_loss": z}
CASES = {
    "a = 1": (cancelling, 1.0),
    "a = 30": (cancelling, 30.0),
    "a = 300": (cancelling, 300.0),
    "signs": (alternating, 3000.0),
    "one class": (one_large_class, 1e4),
}


def exactly(H, W, b, t, loss):
    """The loss and its gradients from all outputs, in float64."""
    leaves = [x.double().requires_grad_() for x in (H, W, b)]
    value = EXACT[loss](leaves[0] @ leaves[1].mT + leaves[2], t)
    return [value, *torch.autograd.grad(value, leaves)]


@pytest.mark.once("lost digits are noticed on a CPU alone")
@pytest.mark.parametrize("loss", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_the_choice_notices_lost_digits(case, loss):
    make, size = CASES[case]
    H, W, b, t = make(size)
    leaves = [x.clone().requires_grad_() for x in (H, W, b)]
    value = linear_spherical_loss(*leaves[:2], t, loss, linear_bias=leaves[2])
    got = [value, *torch.autograd.grad(value, leaves)]
    for x, y in zip(got, exactly(H, W, b, t, loss), strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() <= 1e-3 * y.norm()


@pytest.mark.parametrize("chunk", [None, 700_000])
@pytest.mark.parametrize("bias", [False, True])
def test_long_sums_of_short_rows_keep_the_digits_that_the_look_reckons_with(bias, chunk):
    """A million rows of length 2 with a common part, which hidden states of mean 0 take off."""
    torch.manual_seed(0)
    classes = 1_000_000
    H, W = torch.randn(ROWS, 2), torch.randn(classes, 1) + 0.1 * torch.randn(classes, 2)
    H, t = H - H.mean(1, keepdim=True), torch.randint(classes, (ROWS,))
    x = Inputs(H, W, torch.randn(classes) if bias else None, t.unsqueeze(1), None)
    found = GRAM.guarded(x, Settings(True, None, chunk, torch.float32, False))
    if bias:
        x = x._replace(b=x.b.double())
    wanted = GRAM.guarded(
        Inputs(H.double(), W.double(), *x[2:]), Settings(True, None, None, torch.float64, False)
    )
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-3, atol=0)


def test_a_named_engine_is_not_replaced(monkeypatch):
    called = []
    forward = gram._OPERATOR.forward_operator
    monkeypatch.setattr(gram, "loses_digits", lambda *_: called.append(1))
    H, W, b, t = cancelling(300.0)
    named = LinearSphericalOptions(engine="gram")
    value = linear_spherical_loss(H, W, t, "squared_error", linear_bias=b, options=named)
    assert not called
    how = False, None, None, torch.float32, False
    _, q, c, *_ = forward(H, W, b, t.unsqueeze(1), None, *how)
    torch.testing.assert_close(value, (q - 2 * c.squeeze(1) + 1).mean())


@pytest.mark.once("lost digits are noticed on a CPU alone")
def test_float64_that_has_lost_its_digits_goes_to_the_chunked_engine(monkeypatch):
    chosen = []

    def statistics(x, how):
        chosen.append(how.dtype)
        return chunked.CHUNKED.statistics(x, how)

    fake = type("Fake", (), {"statistics": staticmethod(statistics)})
    monkeypatch.setattr(gram, "CHUNKED", fake)
    H, W, b, t = (x.double() if x.is_floating_point() else x for x in cancelling(1e7))
    value = linear_spherical_loss(H, W, t, "squared_error", linear_bias=b)
    assert chosen == [torch.float64]
    torch.testing.assert_close(value, squared(H @ W.mT + b, t), rtol=1e-3, atol=0)


@pytest.mark.once("lost digits are noticed on a CPU alone")
def test_usual_batches_are_computed_once(monkeypatch):
    called = []

    def loses_digits(*args):
        called.append(args)
        return lost(*args)

    lost = gram.loses_digits
    monkeypatch.setattr(gram, "loses_digits", loses_digits)
    torch.manual_seed(0)
    W, H, t = torch.randn(5000, 256), torch.randn(256, 256), torch.arange(256)
    for hidden in (H, H.relu(), torch.zeros_like(H), H + 5, torch.full_like(H, torch.nan)):
        for loss in EXACT:
            called.clear()
            linear_spherical_loss(hidden, W, t, loss, linear_bias=torch.randn(5000))
            assert len(called) == 1


@pytest.mark.once("lost digits are noticed on a CPU alone")
@pytest.mark.parametrize("make", [cancelling, alternating])
@pytest.mark.parametrize("size", [300.0, 1000.0, 3000.0])
def test_probabilities_sum_to_one_where_columns_cancel(make, size):
    H, W, b, _ = make(size)
    head = LinearSphericalLoss(WIDTH, D)
    head.load_state_dict({"weight": W, "bias": b})
    assert len(H) > WIDTH
    with torch.no_grad():
        got = head.log_prob(H, torch.arange(D))
    torch.testing.assert_close(got.exp().sum(1), torch.ones(ROWS), rtol=1e-3, atol=0)


def test_auto_is_compiled_without_a_look_at_values():
    torch.manual_seed(0)
    H, W, t = torch.randn(300, 16), torch.randn(20_000, 16), torch.arange(300)

    def loss(hidden):
        return linear_spherical_loss(hidden, W, t, "z_loss")

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(H), loss(H))


def head_for(a, **options):
    H, W, b, t = cancelling(a)
    head = LinearSphericalLoss(WIDTH, D, "squared_error", options=LinearSphericalOptions(**options))
    head.load_state_dict({"weight": W, "bias": b})
    return head, H, t


@pytest.mark.once("lost digits are noticed on a CPU alone")
def test_accumulation_refuses_a_batch_whose_digits_are_lost():
    head, H, t = head_for(300.0)
    words = r"accumulate\(\) .*too few digits.*torch\.float64"
    with pytest.raises(RuntimeError, match=words), head.accumulate():
        head(H, t)
    assert head.weight.grad is None


def test_accumulation_in_float64_has_the_digits():
    head, H, t = head_for(300.0, accumulate_dtype=torch.float64)
    with head.accumulate():
        head(H, t).backward()
    exact = exactly(H, head.weight.detach(), head.bias.detach(), t, "squared_error")
    for x, y in zip((head.weight.grad, head.bias.grad), exact[2:], strict=True):
        assert (x - y).norm() <= 1e-3 * y.norm()


def test_accumulation_by_a_named_engine_is_not_refused():
    head, H, t = head_for(300.0, engine="gram")
    with head.accumulate():
        head(H, t).backward()
    assert head.weight.grad is not None
