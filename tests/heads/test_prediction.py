"""Predictions of both layers: log-probabilities, best classes and ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import _factored
from _cases import CASES
from _devices import autocasts
from _output_layers import (
    COUNTS,
    EVERY,
    SOME,
    D,
    all_or_some,
    both,
    d,
    every_kind,
    every_layer,
    layer,
    rows,
)
from _reading import read_in_chunks
from softsphere import (
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
    SphericalLoss,
    losses,
)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
@every_layer
def test_an_empty_batch_has_predictions_of_its_shape(kind, name, leading):
    head = layer(kind, name, prior=COUNTS)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            hidden = rows(*leading)
            assert head.log_prob(hidden).shape == (*leading, D)
            assert head.log_prob(hidden, SOME).shape == (*leading, len(SOME))
            assert head.log_prob(hidden, SOME[:0]).shape == (*leading, 0)
            assert head.predict(hidden).shape == leading
            best = head.topk(hidden, 3)
            assert best.values.shape == best.indices.shape == (*leading, 3)
            assert head.rank(hidden, torch.zeros(leading, dtype=torch.long)).shape == leading


@all_or_some
@every_layer
def test_an_empty_batch_has_a_gradient_of_zero(kind, name, classes):
    head, hidden = layer(kind, name), rows(2, 0)
    head.log_prob(hidden, classes).sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert all(not x.grad.any() for x in head.parameters())


@every_kind
def test_no_classes_at_all_and_a_single_row(kind):
    head = layer(kind)
    assert head.log_prob(rows(3), SOME[:0]).shape == (3, 0)
    assert head.log_prob(rows()).shape == (D,)
    assert head.predict(rows()).shape == ()


@every_kind
def test_classes_are_a_list(kind):
    for classes in (SOME.view(2, 2), SOME[0]):
        with pytest.raises(ValueError, match=r"classes must have shape \(n,\)"):
            layer(kind).log_prob(rows(3), classes)


def batch(*shape):
    return rows(*shape).detach(), torch.randint(D, shape)


NORMALISED = [name for name, (kind, _) in CASES.items() if kind.normalised]


@pytest.mark.parametrize("m", [3, 17])
@pytest.mark.parametrize("prior", [None, COUNTS], ids=["uniform", "prior"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NORMALISED)
def test_probabilities_are_those_of_the_logits(name, bias, prior, m):
    head = layer(LinearSphericalLoss, name, bias=bias, prior=prior)
    read_in_chunks(head, 7)
    hidden, target = batch(m)
    criterion = SphericalLoss(CASES[name][0], prior=prior)
    want = criterion.log_prob(F.linear(hidden, head.weight, head.bias)).detach()
    tolerance = {"rtol": 1e-6, "atol": 1e-8}  # the prior is float32
    got = head.log_prob(hidden)
    torch.testing.assert_close(got, want, **tolerance)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(m).double(), **tolerance)
    some = torch.tensor([0, 5, 5, D - 1])
    torch.testing.assert_close(head.log_prob(hidden, some), want[:, some], **tolerance)
    best = head.topk(hidden, 4)
    torch.testing.assert_close(best.values, want.topk(4).values, **tolerance)
    assert torch.equal(head.predict(hidden), want.argmax(-1))
    own = want.gather(1, target.unsqueeze(1))
    assert torch.equal(head.rank(hidden, target), 1 + (want > own).sum(1))


def test_both_layers_predict_alike():
    head = layer(LinearSphericalLoss, prior=COUNTS)
    factored = FactoredSphericalLoss(d, D, prior=COUNTS, dtype=torch.float64)
    factored.load_state_dict(head.state_dict())
    hidden, target = batch(2, 3)
    torch.testing.assert_close(head.log_prob(hidden), factored.log_prob(hidden))
    assert torch.equal(head.topk(hidden, 3).indices, factored.topk(hidden, 3).indices)
    assert torch.equal(head.rank(hidden, target), factored.rank(hidden, target))
    torch.testing.assert_close(head(hidden, target), factored(hidden, target), rtol=1e-6, atol=0)


def test_ranking_without_probabilities():
    head = layer(LinearSphericalLoss, "z_loss")
    hidden, _ = batch(4)
    logits = F.linear(hidden, head.weight, head.bias)
    assert torch.equal(head.predict(hidden), logits.argmax(1))
    torch.testing.assert_close(head.topk(hidden, 2).values, logits.topk(2).values)
    with pytest.raises(TypeError, match="not a normalised distribution"):
        head.log_prob(hidden)


def test_prediction_in_bfloat16_is_computed_in_float32():
    head = layer(LinearSphericalLoss, dtype=torch.bfloat16)
    wide = layer(LinearSphericalLoss)
    wide.load_state_dict({key: x.double() for key, x in head.state_dict().items()})
    hidden = batch(4)[0].bfloat16()
    assert head.log_prob(hidden).dtype == torch.float32
    torch.testing.assert_close(
        head.log_prob(hidden).double(), wide.log_prob(hidden.double()), rtol=1e-5, atol=1e-5
    )


def test_evaluation_has_a_loss_and_no_gradient():
    head = layer(LinearSphericalLoss).eval()
    hidden, target = batch(4)
    with torch.no_grad():
        loss = head(hidden, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, -head.log_prob(hidden)[range(4), target].mean())


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", _factored.NAMES)
def test_prediction_is_that_of_the_logits(name, prior):
    """The numerator is not monotone: with outputs from −4 to 4 the best may be on either side."""
    counts = torch.arange(1.0, D + 1).double() if prior else None
    head = _factored.layer(name, prior=counts)
    head.load_state_dict({**head.to_linear().state_dict(), "weight": 2 * torch.randn(D, d)},
                         strict=False)  # fmt: skip
    criterion = SphericalLoss(name, prior=counts)
    hidden, target = torch.randn(7, d).double(), torch.randint(D, (7,))
    o = head.to_linear()(hidden)
    assert o.min() < -2
    scores = criterion.scores(o).detach()
    if losses.get(name).normalised:
        torch.testing.assert_close(head.log_prob(hidden), scores)
        some = torch.tensor([3, 0, 3, D - 1])
        torch.testing.assert_close(head.log_prob(hidden, some), scores[:, some])
    else:
        with pytest.raises(TypeError, match="not a normalised distribution"):
            head.log_prob(hidden)
    read_in_chunks(head, 4)  # smaller than k, and not a divisor of D
    best = head.topk(hidden, 9)
    want = scores.topk(9, dim=1)
    torch.testing.assert_close(best.values, want.values)
    assert torch.equal(best.indices, want.indices)
    assert torch.equal(head.predict(hidden), scores.argmax(1))
    above = (scores > scores.gather(1, target.unsqueeze(1))).sum(1) + 1
    assert torch.equal(head.rank(hidden, target), above)


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
            torch.uint32, torch.uint64)  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS)
@every_kind
def test_classes_and_targets_may_be_of_any_integer_dtype(kind, dtype):
    """They are as in forward. In particular uint8 is not a mask."""
    head, hidden = layer(kind, prior=COUNTS).eval(), rows(4)
    target = torch.tensor([0, 1, 30, 5])
    other = target.to(dtype)
    torch.testing.assert_close(head(hidden, other), head(hidden, target), rtol=0, atol=0)
    assert torch.equal(head.rank(hidden, other), head.rank(hidden, target))
    assert head.rank(hidden, other).dtype == torch.int64
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(
                head.log_prob(hidden, other), head.log_prob(hidden, target), rtol=0, atol=0
            )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
@every_kind
def test_classes_and_targets_are_integers(kind, dtype):
    head, hidden = layer(kind), rows(4)
    wrong = torch.ones(4, dtype=dtype)
    with pytest.raises(TypeError, match="target must hold class indices"):
        head.rank(hidden, wrong)
    with pytest.raises(TypeError, match="classes must be a tensor of class indices"):
        head.log_prob(hidden, wrong)
    with pytest.raises(TypeError, match="k must be an integer"):
        head.topk(hidden, 2.0)


def half_layer(dtype, W):
    head = LinearSphericalLoss(W.shape[1], len(W), bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(W)
    return head


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_outputs_that_tie_when_rounded_are_ordered(dtype, step):
    """Outputs 3 + j·step with spacing 2·step: exact in float32, equal in pairs when rounded."""
    W = torch.tensor([[3.0, float(j)] for j in (2, 0, 3, 1)])
    head, hidden = half_layer(dtype, W), torch.tensor([[1.0, step]], dtype=dtype)
    rounded = (hidden @ head.weight.T)[0]
    assert len(rounded.unique()) < 4
    assert head.predict(hidden).tolist() == [2]
    assert head.topk(hidden, 4).indices.tolist() == [[2, 0, 3, 1]]
    assert [head.rank(hidden, torch.tensor([t])).item() for t in range(4)] == [2, 4, 1, 3]
    log_p = head.log_prob(hidden)
    assert log_p.dtype == torch.float32 and len(log_p.unique()) == 4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_half_precision_ranks_by_scores_that_are_not_rounded(kind, dtype, autocast, device):
    """Classes on a circle, so that rounded scores tie in most rows."""
    torch.manual_seed(0)
    many = 400
    angle = torch.arange(many) * (2 * torch.pi / many)
    W = (3 * torch.stack([angle.cos(), angle.sin()], 1)).to(dtype)
    if kind is LinearSphericalLoss:
        head = half_layer(dtype, W)
    else:
        head = kind(2, many, bias=False)
        head.load_state_dict({"weight": W.float()})
    hidden = F.normalize(torch.randn(50, 2)).to(dtype)
    o = hidden.double() @ W.double().T
    scores = (1 + o + o**2 / 2).log()
    rounded = scores.to(dtype)
    assert int((rounded == rounded.max(1, keepdim=True).values).sum()) > 100  # ties
    with torch.autocast(autocasts(device), torch.bfloat16, enabled=autocast):
        best, three = head.predict(hidden), head.topk(hidden, 3)
        log_p, rank = head.log_prob(hidden), head.rank(hidden, scores.topk(2).indices[:, 1])
    near = {"rtol": 1e-5, "atol": 1e-5}  # of float32, a thousandth of a rounded score
    torch.testing.assert_close(scores.gather(1, best[:, None])[:, 0], scores.amax(1), **near)
    torch.testing.assert_close(scores.gather(1, three.indices), scores.topk(3).values, **near)
    want = scores - scores.logsumexp(1, keepdim=True)
    torch.testing.assert_close(log_p.double(), want, **near)
    apart = scores.topk(3).values.diff().abs().amin(1) > 1e-4
    assert int(apart.sum()) > 10
    assert (rank[apart] == 2).all()


@pytest.mark.parametrize("name", ["z_loss", "taylor_softmax", "squared_error"])
@both
def test_nan_scores_rank_last(kind, name):
    torch.manual_seed(0)
    head = kind(d, D, name, dtype=torch.float64)
    state = {key: x.clone() for key, x in head.state_dict().items()}
    state["weight"][[3, 17]] = torch.nan
    head.load_state_dict(state)
    read_in_chunks(head, 7)
    hidden = rows(9).detach()
    o = F.linear(hidden, state["weight"], state["bias"])
    scores = (1 + o + o**2 / 2).log() if name == "taylor_softmax" else o
    ranked = scores.nan_to_num(nan=-torch.inf)
    assert torch.equal(head.predict(hidden), ranked.argmax(1))
    every = head.topk(hidden, D)
    assert torch.equal(every.indices[:, :-2], ranked.argsort(1, descending=True)[:, :-2])
    assert every.indices[:, -2:].sort(1).values.tolist() == [[3, 17]] * 9
    assert every.values[:, -2:].isnan().all()
    if name != "taylor_softmax":
        assert not every.values[:, :-2].isnan().any()
    for target in (0, 3, 17, D - 1):
        above = (ranked > ranked[:, [target]]).sum(1)
        want = torch.full_like(above, D) if target in (3, 17) else 1 + above
        assert torch.equal(head.rank(hidden, torch.full((9,), target)), want)


@every_kind
def test_a_row_of_nan_has_some_class_and_the_last_rank(kind):
    head, hidden = layer(kind), torch.full((2, d), torch.nan).double()
    assert ((head.predict(hidden) >= 0) & (head.predict(hidden) < D)).all()
    assert head.rank(hidden, torch.tensor([0, D - 1])).tolist() == [D, D]
    assert head.topk(hidden, 2).values.isnan().all()


@pytest.mark.parametrize("wide", [False, True])
def test_a_prior_of_another_dtype_than_the_weight_is_not_rounded_away(wide):
    """The smallest share of one prior is zero in float32. The other prior is float32 itself."""
    head = layer(LinearSphericalLoss, dtype=torch.float64 if wide else torch.float32)
    counts = COUNTS.double()
    if not wide:
        counts[3] = 1e-60
    pi = counts * D / counts.sum()
    head.prior = pi.float() if wide else pi
    hidden = rows(4, dtype=head.weight.dtype).detach()
    o = F.linear(hidden, head.weight, head.bias).detach()
    log_t = (1 + o + o**2 / 2).log() + head.prior.to(torch.float64).log()
    want = (log_t - log_t.logsumexp(1, keepdim=True)).to(o.dtype)
    close = {"rtol": 1e-10, "atol": 1e-10} if wide else {"rtol": 1e-5, "atol": 1e-5}
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            torch.testing.assert_close(head.log_prob(hidden).detach(), want, **close)


@pytest.mark.parametrize(("size", "step"), [(1.0, 300.0), (1.0, 1000.0), (1000.0, 1.0)])
@both
def test_a_large_common_part_that_the_bias_cancels_costs_no_digits(kind, size, step):
    """Every row of W begins with `size` and every row of hidden with `step`."""
    torch.manual_seed(0)
    many, width, m = 2000, 16, 64
    W, hidden = 0.1 * torch.randn(many, width), 0.1 * torch.randn(m, width)
    W[:, 0], hidden[:, 0] = size, step
    b = torch.full((many,), -(size * step + 1))
    head = kind(width, many)
    head.load_state_dict({"weight": W, "bias": b})
    o = hidden.double() @ W.double().T + b.double()
    want = (1 + o + o**2 / 2).log().log_softmax(1)
    assert o.abs().max() < 4
    near = {"rtol": 0, "atol": 20 * torch.finfo(torch.float32).eps * size * step}
    with torch.no_grad():
        torch.testing.assert_close(head.log_prob(hidden).double(), want, **near)
        total = head.log_prob(hidden).double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def twins(kind, many, **options):
    """A layer whose classes all have the same row of W."""
    torch.manual_seed(0)
    head = kind(64, many, **options)
    state = {"weight": torch.randn(64).repeat(many, 1), "bias": torch.full((many,), 0.3)}
    head.load_state_dict(state, strict=False)
    read_in_chunks(head, 300)
    return head


@pytest.mark.parametrize("many", [1000, 1003])
@every_kind
def test_classes_with_equal_rows_all_rank_first(kind, many):
    """Products with equal rows may differ in their last digits, and so may scores."""
    head, hidden = twins(kind, many), torch.randn(40, 64)
    for first in (0, 290, many - 40):
        assert head.rank(hidden, torch.arange(first, first + 40)).tolist() == [1] * 40


@both
def test_classes_with_equal_rows_are_ordered_by_the_prior(kind):
    many = 1000
    head = twins(kind, many, prior=torch.arange(many) // 2 + 1)
    for t in (0, 5, 700, 999):
        rank = head.rank(torch.randn(10, 64), torch.full((10,), t))
        assert rank.tolist() == [1 + many - 2 * (t // 2 + 1)] * 10


def test_classes_that_no_step_has_touched_stay_equal():
    """Every step changes the factor U, and through it all rows of W."""
    head, hidden = twins(FactoredSphericalLoss, 1000), torch.randn(40, 64)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, 64), torch.arange(4)).backward()
        optimizer.step()
    W = head.dense().double()
    o = hidden.double() @ W[:5, :64].T + W[:5, 64]
    scores = 1 + o + o**2 / 2
    want = 1 + (scores[:, :4] > scores[:, 4:]).sum(1)
    assert torch.equal(head.rank(hidden, torch.arange(4, 44)), want)
    assert torch.equal(head.rank(hidden, torch.arange(900, 940)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both
def test_rows_that_differ_in_one_simple_number_are_not_equal(kind, dtype):
    """Rows of few distinct simple numbers, so that outputs are exact on every machine."""
    torch.manual_seed(0)
    W = torch.randint(-2, 3, (400, 5)).to(dtype)
    W[W == 0] *= torch.randint(0, 2, W[W == 0].shape) * -2.0 + 1  # some −0
    head = kind(5, 400, "squared_error", bias=False, dtype=dtype)
    head.load_state_dict({"weight": W})
    hidden = torch.tensor([[1.0, 8, 64, 512, 4096], [1, 1, 1, 1, 1]], dtype=dtype)
    o = hidden @ W.T
    for t in range(0, 400, 7):
        want = 1 + (o > o[:, [t]]).sum(1)
        assert torch.equal(head.rank(hidden, torch.full((2,), t)), want)


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("ask", ["predict", "topk", "rank", "log_prob", "some", "differentiable"])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(
    ("kind", "name"), [x for x in EVERY if x[1] not in ("softmax", "soft_margin")]
)
def test_a_class_cannot_be_forbidden_by_a_bias(kind, name, value, ask):
    """For a softmax it has probability 0. Here t(o) grows again, and it would be the best class."""
    head = kind(d, D, CASES[name][0])
    state = {key: x.clone() for key, x in head.state_dict().items()}
    state["bias"][5] = value
    head.load_state_dict(state)
    hidden, target = torch.randn(4, d), torch.arange(4)
    asked = {
        "predict": lambda: head.predict(hidden),
        "topk": lambda: head.topk(hidden, 2),
        "rank": lambda: head.rank(hidden, target),
        "log_prob": lambda: head.requires_grad_(False).log_prob(hidden),
        "some": lambda: head.requires_grad_(False).log_prob(hidden, target),
        "differentiable": lambda: head.log_prob(hidden),
    }
    with pytest.raises(ValueError, match=r"outputs .* must be finite.*mask=…"):
        asked[ask]()


@pytest.mark.parametrize("kind", [LinearSphericalLoss, SampledSoftmaxLoss])
def test_a_softmax_may_forbid_a_class_by_its_bias(kind):
    head = layer(kind, "softmax", dtype=torch.float32)
    with torch.no_grad():
        head.bias[5] = -torch.inf
    hidden = torch.randn(4, d)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert (head.log_prob(hidden).exp()[:, 5] == 0).all()
            assert (head.topk(hidden, D).indices[:, -1] == 5).all()
            assert (head.rank(hidden, torch.full((4,), 5)) == D).all()


@both
def test_infinite_scores_rank_last_where_values_cannot_be_looked_at(kind):
    head = kind(d, D)
    state = {key: x.clone() for key, x in head.state_dict().items()}
    state["bias"][5] = -torch.inf
    head.load_state_dict(state)
    hidden = torch.randn(4, d)
    assert (torch.func.vmap(head.predict)(hidden) != 5).all()
    five = torch.full((4,), 5)
    assert (torch.func.vmap(head.rank)(hidden, five) == D).all()
    assert (torch.func.vmap(head.rank)(hidden, five - 1) < D).all()
