"""The linear output layer: losses, parameters, saving, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from _cases import CASES
from softsphere import (
    LinearSphericalLoss,
    LinearSphericalOptions,
    SphericalLoss,
)
from softsphere.functional import linear_spherical_loss

d, D = 6, 31


def layer(loss="taylor_softmax", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return LinearSphericalLoss(d, D, loss, dtype=dtype, **options)


def batch(*shape, dtype=torch.float64):
    return torch.randn(*shape, d, dtype=dtype), torch.randint(D, shape)


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "sum": {"reduction": "sum"},
    "ignored": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.1},
    "prior": {"prior": torch.arange(1.0, D + 1)},
    "weight": {"weight": torch.arange(1.0, D + 1).double()},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_criterion_on_the_outputs_of_a_linear_layer(name, case):
    kind, options = CASES[name][0], OPTIONS[case]
    if options.get("label_smoothing") and not kind.smoothable:
        with pytest.raises(ValueError, match="label_smoothing has no meaning"):
            layer(kind, **options)
        return
    head = layer(kind, **options)
    prior = options.get("prior")
    rest = {key: value for key, value in options.items() if key not in ("bias", "prior")}
    criterion = SphericalLoss(kind, prior=None if prior is None else prior.double(), **rest)
    hidden, target = batch(5)
    target[2] = 3
    got = head(hidden, target)
    want = criterion(F.linear(hidden, head.weight, head.bias), target)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_class_probabilities_and_sparse_targets():
    head, hidden = layer(), batch(5)[0]
    logits = F.linear(hidden, head.weight, head.bias)
    p = torch.rand(5, D).double()
    torch.testing.assert_close(head(hidden, p), SphericalLoss("taylor_softmax")(logits, p))
    target, values = torch.randint(D, (5, 3)), torch.rand(5, 3).double()
    want = SphericalLoss("taylor_softmax")(logits, target, values)
    torch.testing.assert_close(head(hidden, target, values), want)
    shaped = head(hidden.view(5, 1, d), target.view(5, 1, 3), values.view(5, 1, 3))
    torch.testing.assert_close(shaped, want)


def test_it_starts_as_a_linear_layer_does():
    torch.manual_seed(3)
    head = LinearSphericalLoss(64, 5000)
    for x in (head.weight, head.bias):
        assert x.abs().max() <= 1 / 8
        assert x.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    before = head.weight.clone()
    head.reset_parameters()
    assert not torch.equal(before, head.weight)
    assert [name for name, _ in head.named_parameters()] == ["weight", "bias"]


def test_adam_trains_it_as_it_trains_the_logits():
    head = layer("z_loss")
    linear = nn.Linear(d, D, dtype=torch.float64)
    linear.load_state_dict(head.state_dict())
    one, two = (torch.optim.Adam(x.parameters(), lr=0.01) for x in (head, linear))
    for _ in range(20):
        hidden, target = batch(7)
        one.zero_grad()
        two.zero_grad()
        head(hidden, target).backward()
        SphericalLoss("z_loss")(linear(hidden), target).backward()
        one.step()
        two.step()
    torch.testing.assert_close(head.weight, linear.weight, rtol=1e-7, atol=1e-7)


def test_borrowed_parameters_are_the_same_objects():
    linear, embedding = nn.Linear(d, D), nn.Embedding(D, d)
    head = LinearSphericalLoss.from_linear(linear, "z_loss", reduction="sum")
    assert head.weight is linear.weight and head.bias is linear.bias
    assert head.reduction == "sum" and head.in_features == d and head.num_classes == D
    tied = LinearSphericalLoss.from_linear(embedding, prior=torch.ones(D))
    assert tied.weight is embedding.weight and tied.bias is None
    tied(embedding(torch.tensor([1, 2])), torch.tensor([3, 4])).backward()
    twin = embedding.weight.detach().clone().requires_grad_()
    logits = F.linear(F.embedding(torch.tensor([1, 2]), twin), twin)
    SphericalLoss("taylor_softmax")(logits, torch.tensor([3, 4])).backward()
    torch.testing.assert_close(embedding.weight.grad, twin.grad)
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear.*got ReLU"):
        LinearSphericalLoss.from_linear(nn.ReLU())


def test_state_is_that_of_a_linear_layer():
    linear = nn.Linear(d, D)
    counts = torch.arange(1.0, D + 1)
    head = LinearSphericalLoss(d, D, prior=counts, weight=torch.rand(D))
    before = head.prior.clone()
    head.load_state_dict(linear.state_dict())
    assert torch.equal(head.weight, linear.weight) and torch.equal(head.prior, before)
    linear.load_state_dict(LinearSphericalLoss(d, D).state_dict())
    other = LinearSphericalLoss(d, D, prior=torch.ones(D), weight=torch.rand(D))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.prior, head.prior)
    assert torch.equal(other.class_weight, head.class_weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        head.load_state_dict({"weight": linear.weight})
    hidden, target = batch(3, dtype=torch.float32)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(hidden, target), head(hidden, target))


def test_its_representation_says_what_matters():
    head = LinearSphericalLoss(
        d, D, "z_loss", prior=torch.ones(D), options=LinearSphericalOptions(engine="gram")
    )
    text = repr(head)
    for part in ("6, 31", "ZLoss", "bias=True", "engine='gram'", "prior=…"):
        assert part in text


SMOOTHING = "label_smoothing needs the logits, got 0.1.*'dense'"


PROBABILITIES = "target of class probabilities needs the logits.*'dense'"


@pytest.mark.parametrize("engine", ["chunked", "gram"])
def test_a_named_engine_is_not_replaced(engine):
    options = LinearSphericalOptions(engine=engine)
    hidden, target = batch(3)
    with pytest.raises(TypeError, match=r"loss must be spherical.*Softmax.*'dense'"):
        layer("softmax", options=options)(hidden, target)
    with pytest.raises(ValueError, match=SMOOTHING):
        layer(label_smoothing=0.1, options=options)(hidden, target)
    with pytest.raises(ValueError, match=PROBABILITIES):
        layer(options=options)(hidden, torch.rand(3, D))


HIDDEN, TARGET, WEIGHT = torch.zeros(4, d), torch.zeros(4, dtype=torch.long), torch.zeros(D, d)


def call(input=HIDDEN, W=WEIGHT, target=TARGET, loss="taylor_softmax", **options):
    return linear_spherical_loss(input, W, target, loss, **options)


WRONG = {
    r"input must have shape \(…, in_features = 6\), got \(4, 5\)": {"input": torch.zeros(4, 5)},
    r"linear_weight must have shape \(num_classes, in_features\).*got \(6,\)": {"W": WEIGHT[0]},
    r"at least one class, got \(0, 6\)": {"W": WEIGHT[:0]},
    r"linear_bias must have shape \(31,\).*got \(6,\)": {"linear_bias": torch.zeros(6)},
    r"weight must have shape \(31,\)": {"weight": torch.ones(3)},
    r"prior must have shape \(31,\)": {"prior": torch.ones(3)},
    r"leading shape of input \(4,\), got \(3,\)$": {"target": TARGET[:3]},
    r"leading shape of input \(4,\), got \(4, 1\); use target.squeeze": {"target": TARGET[:, None]},
    r"class probabilities must have shape \(4, 31\), got \(4,\)": {"target": TARGET.float()},
    r"target must be in \[0, 31\) or ignore_index = -100, got 31": {"target": TARGET + 31},
    r"shape \(…, K\) for rows \(4,\)": {"target_values": torch.ones(4)},
    "reduction must be one of": {"reduction": "avg"},
    "weight has no meaning for the squared error": {
        "loss": "squared_error", "target": TARGET[:, None], "target_values": torch.ones(4, 1),
        "weight": torch.ones(D),
    },
    "label_smoothing has no meaning for ZLoss": {"loss": "z_loss", "label_smoothing": 0.1},
}  # fmt: skip


WRONG_TYPE = {
    "input must be a floating-point tensor, got torch.int64": {"input": HIDDEN.long()},
    "linear_weight must be a floating-point tensor, got None": {"W": None},
    "linear_weight must have the dtype of input torch.float32, got torch.float64": {
        "W": WEIGHT.double()
    },
    "linear_bias must have the dtype of input": {"linear_bias": torch.zeros(D).double()},
    r"target must hold class indices.*target\.long": {"target": TARGET.bool()},
    "target must be a tensor": {"target": [0, 0, 0, 0]},
    "options must be LinearSphericalOptions, got 'gram'": {"options": "gram"},
}


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("message", WRONG)
def test_value_errors(message):
    with pytest.raises(ValueError, match=message):
        call(**WRONG[message])


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("message", WRONG_TYPE)
def test_type_errors(message):
    with pytest.raises(TypeError, match=message):
        call(**WRONG_TYPE[message])


@pytest.mark.once("it names its devices")
@pytest.mark.parametrize("way", ["to_empty", "skip_init"])
def test_a_layer_from_the_meta_device_has_its_prior_and_class_weights(way):
    given = {"weight": torch.arange(1.0, D + 1), "prior": torch.rand(D) + 0.1}
    if way == "to_empty":
        head = LinearSphericalLoss(d, D, device="meta", **given).to_empty(device="cpu")
    else:
        head = nn.utils.skip_init(LinearSphericalLoss, d, D, **given)
    head.reset_parameters()
    want = LinearSphericalLoss(d, D, **given)
    torch.testing.assert_close(head.class_weight, want.class_weight, rtol=0, atol=0)
    torch.testing.assert_close(head.prior, want.prior, rtol=0, atol=0)


@pytest.mark.once("it names its devices")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_what_is_loaded_on_the_meta_device_stays(assign):
    given = {"weight": torch.arange(1.0, D + 1), "prior": torch.rand(D) + 0.1}
    want = LinearSphericalLoss(d, D, weight=torch.ones(D), prior=torch.ones(D))
    head = LinearSphericalLoss(d, D, device="meta", **given)
    head.load_state_dict(want.state_dict(), assign=assign)
    head = head.float() if assign else head.to_empty(device="cpu")
    assert torch.equal(head.class_weight, want.class_weight)
    assert torch.equal(head.prior, want.prior)


@pytest.mark.once("it names its devices")
def test_a_prior_that_is_assigned_on_the_meta_device_stays():
    head = LinearSphericalLoss(d, D, device="meta", prior=torch.rand(D) + 0.1)
    head.prior = torch.ones(D)
    assert torch.equal(head.to_empty(device="cpu").double().prior, torch.ones(D).double())


@pytest.mark.once("values are checked on a CPU alone")
def test_a_prior_that_lost_its_sum_is_refused_by_predictions_too():
    head = layer(prior=torch.arange(1.0, D + 1))
    hidden, target = batch(3)
    head.prior.mul_(3)
    for call in (
        lambda: head(hidden, target),
        lambda: head.log_prob(hidden),
        lambda: head.log_prob(hidden, target),
        lambda: head.topk(hidden, 2),
        lambda: head.predict(hidden),
        lambda: head.rank(hidden, target),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="the buffer prior must sum to"):
            call()


def test_an_assigned_loss_is_checked_and_may_be_a_name():
    head = layer()
    head.loss = "z_loss"
    hidden, target = batch(3)
    want = layer("z_loss")
    torch.testing.assert_close(head(hidden, target), want(hidden, target))
    torch.testing.assert_close(head.eval().predict(hidden), want.eval().predict(hidden))
    with pytest.raises(ValueError, match="loss must be"):
        head.loss = "nonsense"
    with pytest.raises(TypeError, match="options must be"):
        head.options = "gram"
    head.options = None
    assert head.options == LinearSphericalOptions()
