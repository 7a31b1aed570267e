"""Sizes, dtypes and options of both layers, and what is refused at construction."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from _output_layers import KINDS, every_kind
from softsphere import (
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
    SphericalLoss,
)
from softsphere.losses import REGISTRY
from softsphere.matrix import FactoredTensor

d, D, MORE = 6, 30, 40
both = pytest.mark.parametrize("kind", KINDS[:2])


# How a vocabulary grows: transformers gives the parameter new data, or the layer a new parameter.
def new_data(head, size=MORE):
    head.weight.data = torch.randn(size, d)


def new_parameter(head, size=MORE):
    head.weight = nn.Parameter(torch.randn(size, d))


def embedding_grows(head, size=MORE):
    """What resize_token_embeddings does to a tied embedding."""
    words = nn.Embedding(D, d)
    tied = LinearSphericalLoss.from_linear(words)
    words.weight.data = torch.randn(size, d)
    words.num_embeddings = size
    head.weight = tied.weight


RESIZED = [new_data, new_parameter, embedding_grows]


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("engine", ["auto", "dense", "chunked", "gram"])
@pytest.mark.parametrize("resize", RESIZED)
def test_a_resized_weight_has_its_own_classes_everywhere(resize, engine):
    torch.manual_seed(0)
    options = LinearSphericalOptions(engine=engine)
    head = LinearSphericalLoss(d, D, bias=False, options=options)
    resize(head)
    assert (head.num_classes, head.in_features) == (MORE, d)
    assert repr(head).startswith(f"LinearSphericalLoss({d}, {MORE}, ")
    criterion = SphericalLoss("taylor_softmax")
    hidden, target = torch.randn(5, d), torch.tensor([0, 29, 30, 35, MORE - 1])
    logits = (hidden @ head.weight.T).detach()
    torch.testing.assert_close(head(hidden, target), criterion(logits, target))
    log_p = criterion.log_prob(logits)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(head.log_prob(hidden), log_p)
            some = torch.tensor([0, MORE - 1])
            torch.testing.assert_close(head.log_prob(hidden, some), log_p[:, some])
    assert head.topk(hidden, MORE).indices.shape == (5, MORE)
    assert torch.equal(head.predict(hidden), log_p.argmax(1))
    own = log_p.gather(1, target[:, None])
    assert torch.equal(head.rank(hidden, target), 1 + (log_p > own).sum(1))
    with pytest.raises(ValueError, match=r"target must be in \[0, 40\)"):
        head(hidden, target + 1)
    with pytest.raises(ValueError, match=r"target must be in \[0, 40\)"):
        head.rank(hidden, target + 1)
    head.load_state_dict(nn.Linear(d, MORE, bias=False).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head.load_state_dict(nn.Linear(d, D, bias=False).state_dict())
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert twin.num_classes == MORE


@pytest.mark.parametrize("resize", RESIZED)
def test_gradients_accumulate_for_a_resized_weight(resize):
    head = LinearSphericalLoss(d, D, bias=False)
    resize(head)
    hidden, target = torch.randn(4, d), torch.tensor([0, 31, 35, MORE - 1])
    head(hidden, target).backward()
    want, head.weight.grad = head.weight.grad, None
    with head.accumulate():
        head(hidden, target).backward()
    torch.testing.assert_close(head.weight.grad, want)


ASKED = {
    "forward": lambda head, hidden: head(hidden, torch.arange(2)),
    "log_prob": lambda head, hidden: head.log_prob(hidden),
    "some": lambda head, hidden: head.log_prob(hidden, torch.arange(2)),
    "topk": lambda head, hidden: head.topk(hidden, 3),
    "predict": lambda head, hidden: head.predict(hidden),
    "rank": lambda head, hidden: head.rank(hidden, torch.arange(2)),
    "accumulate": lambda head, hidden: head.accumulate().__enter__(),
}


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("old", ["bias", "prior", "class_weight"])
@pytest.mark.parametrize("size", [MORE, 1])
def test_what_has_the_old_size_is_named(old, ask, size):
    options = {
        "bias": {},
        "prior": {"bias": False, "prior": torch.ones(D)},
        "class_weight": {"bias": False, "weight": torch.ones(D)},
    }[old]
    head = LinearSphericalLoss(d, D, **options)
    new_parameter(head, size)
    words = rf"{old} must have shape \({size},\).*got \(30,\).*set head\.{old}"
    with pytest.raises(ValueError, match=words):
        ASKED[ask](head, torch.randn(2, d))
    assert head.accumulation is None


@pytest.mark.parametrize("ask", ASKED)
def test_a_weight_that_is_no_matrix_is_named(ask):
    head = LinearSphericalLoss(d, D, bias=False)
    head.weight = nn.Parameter(torch.randn(D * d))
    with pytest.raises((ValueError, RuntimeError), match=r"weight.*num_classes.*got.*\(180,\)"):
        ASKED[ask](head, torch.randn(2, d))
    assert "180" in repr(head)


@pytest.mark.parametrize("ask", [x for x in ASKED if x != "accumulate"])
def test_a_factored_weight_of_another_size_is_named(ask):
    head = FactoredSphericalLoss(d, D)
    head.weight = nn.Parameter(FactoredTensor(torch.randn(MORE, d), torch.zeros(MORE)))
    with pytest.raises(ValueError, match=r"weight must have shape \(30, 7\), got \(40, 7\)"):
        ASKED[ask](head, torch.randn(2, d))
    with pytest.raises(ValueError, match=r"weight must have shape \(30, 7\)"):
        head.to_linear()


@pytest.mark.parametrize("engine", ["auto", "gram", "dense"])
def test_a_parametrization_is_computed_once_in_a_call(engine):
    """The spectral norm of a layer in training changes whenever the weight is read."""
    torch.manual_seed(0)
    options = LinearSphericalOptions(engine=engine)
    head = LinearSphericalLoss(d, D, options=options, dtype=torch.float64)
    parametrizations.spectral_norm(head, "weight")
    hidden, every = torch.randn(9, d, dtype=torch.float64), torch.arange(D)
    for context in (torch.no_grad, torch.enable_grad):
        for classes in (None, every):
            with context():
                total = head.log_prob(hidden, classes).exp().sum(1)
            torch.testing.assert_close(total, torch.ones(9).double(), rtol=1e-12, atol=0)
    seen = []
    head.parametrizations.weight.register_forward_hook(lambda *_: seen.append(1))
    for ask in ("forward", "some", "topk", "predict", "rank"):
        seen.clear()
        ASKED[ask](head, hidden[:2])
        assert len(seen) == 1, ask


@pytest.mark.parametrize("counts", [torch.arange(1, D + 1), torch.arange(1.0, D + 1)])
@both
def test_a_prior_has_the_precision_of_the_weight(kind, counts):
    want = counts.double() * D / counts.sum()
    for dtype in (torch.float32, torch.float64):
        pi = kind(d, D, prior=counts, dtype=dtype).base_measure
        assert pi.dtype == dtype
        torch.testing.assert_close(pi, want.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    torch.set_default_dtype(torch.float64)
    try:
        assert kind(d, D, prior=counts).base_measure.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    head = kind(d, D, prior=counts).double()
    assert head.base_measure.dtype == torch.float64
    assert float(head.base_measure.sum()) == pytest.approx(D, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prior_beside_half_precision_is_float32(dtype):
    head = LinearSphericalLoss(d, D, prior=torch.arange(1, D + 1), dtype=dtype)
    assert head.prior.dtype == torch.float32
    linear = nn.Linear(d, D, dtype=dtype)
    other = LinearSphericalLoss.from_linear(linear, prior=torch.arange(1, D + 1))
    assert torch.equal(other.prior, head.prior)


BAD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32"]


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
@every_kind
def test_a_dtype_without_weights_is_refused_at_once(kind, dtype):
    with pytest.raises(TypeError, match=r"dtype must be .*torch.float32.*got"):
        kind(d, D, dtype=dtype)


UNSMOOTHABLE = next(name for name, make in REGISTRY.items() if not make().smoothable)
WRONG = {
    "bias": ({"bias": 2}, TypeError, "bias must be True or False, got 2"),
    "bias None": ({"bias": None}, TypeError, "bias must be True or False"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    "complex prior": ({"prior": torch.ones(D) + 1j}, TypeError, "prior must be a tensor"),
    "prior size": ({"prior": torch.ones(D + 1)}, ValueError, r"prior must have shape \(30,\)"),
    "smoothing of a loss without one": (
        {"loss": UNSMOOTHABLE, "label_smoothing": 0.1},
        ValueError,
        "label_smoothing has no meaning",
    ),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between"),
    "complex weights": (
        {"weight": torch.ones(D) + 1j},
        TypeError,
        "weight must be a floating-point tensor",
    ),
    "options": ({"options": {"engine": "gram"}}, TypeError, "options must be Linear"),
}


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (kind, case)
        for case, (options, *_) in WRONG.items()
        for kind in KINDS
        if options.keys() <= inspect.signature(kind).parameters.keys()
    ],
)
def test_a_wrong_option_is_refused_at_once(kind, case):
    options, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        kind(d, D, **options)


@every_kind
def test_sizes_are_integers_of_any_kind(kind):
    head = kind(np.int64(d), np.int32(D), ignore_index=np.int64(-1))
    assert (type(head.in_features), type(head.num_classes)) == (int, int)
    hidden, target = torch.randn(3, d), torch.tensor([0, -1, 5])
    want = kind(d, D, ignore_index=-1)
    want.load_state_dict(head.state_dict())
    torch.testing.assert_close(head.eval()(hidden, target), want.eval()(hidden, target))
    for wrong in (0, True, 2.0, None, torch.ones(2)):
        for sizes in ((wrong, D), (d, wrong)):
            with pytest.raises((TypeError, ValueError), match=r"(in_features|num_classes) must be"):
                kind(*sizes)


CALLS = {
    r"hidden must have shape \(…, in_features = 6\), got \(2, 5\)": (torch.ones(2, 5), [0, 1]),
    "hidden must be a floating-point tensor, got torch.int64": (torch.ones(2, d).long(), [0, 1]),
    "hidden must be a floating-point tensor, got None": (None, [0, 1]),
    r"leading shape of hidden \(2,\), got \(3,\)": (torch.ones(2, d), [0, 1, 2]),
}


@pytest.mark.parametrize("words", CALLS)
@every_kind
def test_errors_name_the_arguments_of_the_layer(kind, words):
    head, (hidden, target) = kind(d, D), CALLS[words]
    asked = [head, head.rank]
    if "leading" not in words:
        asked += [lambda h, t: head.log_prob(h), lambda h, t: head.predict(h)]
        asked += [lambda h, t: head.topk(h, 2)]
    for ask in asked:
        with pytest.raises((TypeError, ValueError), match=words):
            ask(hidden, torch.tensor(target))


def test_a_dtype_that_differs_is_named_as_the_layer_names_it():
    head = LinearSphericalLoss(d, D)
    with pytest.raises(TypeError, match=r"weight must have the dtype of hidden torch.float64"):
        head(torch.ones(2, d).double(), torch.tensor([0, 1]))


@pytest.mark.once("it names its devices")
@pytest.mark.parametrize("ask", [x for x in ASKED if x != "accumulate"])
@every_kind
def test_tensors_on_different_devices_are_named(kind, ask):
    head, away = kind(d, D), torch.empty(2, d, device="meta")
    with pytest.raises(ValueError, match=r"must be on the device of .*(meta.*cpu|cpu.*meta)"):
        ASKED[ask](head, away)


@every_kind
def test_targets_on_another_device_are_named(kind):
    head, hidden, away = (
        kind(d, D),
        torch.ones(2, d),
        torch.zeros(2, dtype=torch.long, device="meta"),
    )
    for ask in (head, head.rank):
        with pytest.raises(ValueError, match="target must be on the device of hidden"):
            ask(hidden, away)
    with pytest.raises(ValueError, match="classes must be on the device of hidden"):
        head.log_prob(hidden, away)


@pytest.mark.once("values are checked on a CPU alone")
@every_kind
def test_no_row_is_ignored_with_none(kind):
    head, hidden = kind(d, D, ignore_index=None), torch.ones(2, d)
    head(hidden, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"target must be in \[0, 30\)"):
        head(hidden, torch.tensor([0, -100]))


WRONG_KINDS = {
    "complex weight": ("weight", torch.complex64, "weight must be a floating-point tensor"),
    "integer weight": ("weight", torch.int64, "weight must be a floating-point tensor"),
    "float8 weight": ("weight", torch.float8_e4m3fn, "weight must be float16"),
    "complex bias": ("bias", torch.complex64, "bias must be a floating-point tensor"),
    "wide bias": ("bias", torch.float64, "bias must have the dtype of"),
    "narrow bias": ("bias", torch.bfloat16, "bias must have the dtype of"),
    "sparse weight": ("weight", torch.sparse_coo, "weight must be a dense tensor"),
}


@pytest.mark.once("it names its devices")
@pytest.mark.parametrize("ask", ["forward", "log_prob", "some", "topk", "predict", "rank"])
@pytest.mark.parametrize("case", WRONG_KINDS)
@pytest.mark.parametrize("kind", [LinearSphericalLoss, SampledSoftmaxLoss])
def test_a_replaced_parameter_of_another_kind_is_refused_everywhere(kind, case, ask):
    name, other, words = WRONG_KINDS[case]
    head = kind(d, D)
    value = getattr(head, name).detach()
    value = value.to_sparse() if other is torch.sparse_coo else value.to(other)
    setattr(head, name, nn.Parameter(value, requires_grad=False))
    hidden, target = torch.randn(3, d), torch.arange(3)
    asked = {
        "forward": lambda: head(hidden, target),
        "log_prob": lambda: head.log_prob(hidden),
        "some": lambda: head.log_prob(hidden, target),
        "topk": lambda: head.topk(hidden, 2),
        "predict": lambda: head.predict(hidden),
        "rank": lambda: head.rank(hidden, target),
    }
    with pytest.raises(TypeError, match=words):
        asked[ask]()
