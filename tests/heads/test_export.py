"""Predictions of both layers in exported and compiled programs."""

from __future__ import annotations

import inspect
import io

import pytest
import torch
from torch import nn

from _output_layers import (
    CLOSE,
    COUNTS,
    SOME,
    D,
    d,
    layer,
    rows,
)
from softsphere import (
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
    SphericalLoss,
)
from softsphere.criteria import TopK

ASKED = {
    "log_prob": lambda head, hidden, some: head.log_prob(hidden),
    "some": lambda head, hidden, some: head.log_prob(hidden, some),
    "predict": lambda head, hidden, some: head.predict(hidden),
    "topk": lambda head, hidden, some: head.topk(hidden, 3),
    "excluding": lambda head, hidden, some: head.topk(
        hidden, 3, some.expand(*hidden.shape[:-1], -1)
    ),
}


EXPORTED = [
    (LinearSphericalLoss, "taylor_softmax"),
    (LinearSphericalLoss, "softmax"),
    (SampledSoftmaxLoss, "softmax"),
]


# Strict mode is slow; one layer is asked everything in it, and the others in slow runs alone.
EVERY_EXPORT = [
    pytest.param(
        *of, what, strict, marks=[pytest.mark.slow] if strict and of != EXPORTED[0] else []
    )
    for of in EXPORTED
    for what in ASKED
    for strict in (False, True)
]


class Asked(nn.Module):
    """A trunk and a layer, one of whose methods is called."""

    def __init__(self, head, what):
        super().__init__()
        self.trunk, self.head = nn.Linear(d, d, dtype=head.weight.dtype), head
        self.ask = ASKED[what]
        self.register_buffer("some", SOME.clone())

    def forward(self, hidden):
        return self.ask(self.head, self.trunk(hidden), self.some)


def exported(module, shape, strict):
    sizes = {i: torch.export.Dim(f"n{i}") for i in range(len(shape))}
    hidden = rows(*shape).detach()
    return torch.export.export(module, (hidden,), dynamic_shapes=(sizes,), strict=strict)


@pytest.mark.parametrize(("kind", "name", "what", "strict"), EVERY_EXPORT)
def test_an_exported_layer_takes_batches_of_any_size(kind, name, what, strict):
    module = Asked(layer(kind, name, prior=COUNTS), what)
    program = exported(module, (4,), strict)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(node.target.__module__ != "torch.ops.softsphere" for node in nodes)
    assert not list(program.graph_module.children())  # no context that was kept
    for m in (1, 2, 7, 300):
        hidden = rows(m, seed=m).detach()
        torch.testing.assert_close(program.module()(hidden), module(hidden), **CLOSE)


# torch 2.11 warns about what it loads.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_layer_that_was_saved_takes_any_leading_shape(strict):
    module = Asked(layer(LinearSphericalLoss), "log_prob")
    kept = io.BytesIO()
    torch.export.save(exported(module, (2, 3), strict), kept)
    program = torch.export.load(io.BytesIO(kept.getvalue()))
    for shape in ((1, 1), (5, 2), (0, 3)):
        hidden = rows(*shape).detach()
        torch.testing.assert_close(program.module()(hidden), module(hidden), **CLOSE)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("of", ["layer", "criterion"])
def test_a_saved_program_returns_the_best_classes_by_name(of, strict):
    module = Asked(layer(LinearSphericalLoss), "topk")
    if of == "criterion":
        module.head = SphericalLoss("taylor_softmax")
    kept = io.BytesIO()
    torch.export.save(exported(module, (4,), strict), kept)
    got = torch.export.load(io.BytesIO(kept.getvalue())).module()(rows(7).detach())
    assert type(got) is TopK
    want = module(rows(7).detach())
    torch.testing.assert_close(got.values, want.values, **CLOSE)
    assert torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("what", ["log_prob", "predict"])
def test_a_factored_layer_names_what_can_be_exported(what, strict):
    if strict and "reason" not in inspect.signature(torch.compiler.disable).parameters:
        pytest.skip("before torch 2.7 there was no reason that could be given")
    module = Asked(layer(FactoredSphericalLoss), what)
    with pytest.raises(Exception, match=r"head\.to_linear\(\)"):
        exported(module, (4,), strict)


def test_a_factored_layer_that_the_program_does_not_hold_names_what_can_be_exported():
    module = Asked(layer(FactoredSphericalLoss), "log_prob")
    module.head, hidden = nn.Identity(), module.head
    module.forward = lambda x: hidden.log_prob(x)
    with pytest.raises(RuntimeError, match=r"head\.to_linear\(\).*LinearSphericalLoss"):
        exported(module, (4,), False)


class ToLinear(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.linear = head.to_linear()
        self.criterion = SphericalLoss(head.loss, prior=head.base_measure)

    def forward(self, hidden):
        return self.criterion.log_prob(self.linear(hidden))


def same_state(head):
    other = LinearSphericalLoss(d, D, head.loss, prior=COUNTS.double(), dtype=torch.float64)
    other.load_state_dict(head.state_dict())
    module = nn.Module()
    module.head, module.forward = other, other.log_prob
    return module


@pytest.mark.parametrize("instead", [ToLinear, same_state])
def test_what_a_factored_layer_names_can_be_exported(instead):
    head = layer(FactoredSphericalLoss, prior=COUNTS)
    program = exported(instead(head), (4,), False)
    for m in (1, 9):
        torch.testing.assert_close(program.module()(rows(m)), head.log_prob(rows(m)), **CLOSE)


@pytest.fixture
def _forget():
    """Resets the compiler, which limits how often it compiles one function for all layers."""
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize(
    ("kind", "name", "classes"),
    [
        (LinearSphericalLoss, "taylor_softmax", None),
        (LinearSphericalLoss, "softmax", SOME),
        (FactoredSphericalLoss, "taylor_softmax", SOME),
        pytest.param(LinearSphericalLoss, "taylor_softmax", SOME, marks=pytest.mark.slow),
        pytest.param(SampledSoftmaxLoss, "softmax", SOME, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_layer_has_the_same_gradients(kind, name, classes):
    head, whole = layer(kind, name, prior=COUNTS), kind is not FactoredSphericalLoss

    def log_prob(hidden):
        return head.log_prob(hidden, classes)

    compiled = torch.compile(log_prob, backend="aot_eager", fullgraph=whole)
    for m in (4, 14, 1):
        results = []
        for f in (compiled, log_prob):
            hidden = rows(m)
            log_p = f(hidden)
            grads = torch.autograd.grad(log_p.square().sum(), [hidden, *head.parameters()])
            results.append((log_p, *grads))
        torch.testing.assert_close(*results, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden), log_prob(hidden), **CLOSE)


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize(
    "kind",
    [
        LinearSphericalLoss,
        FactoredSphericalLoss,
        # it predicts by the methods of the first
        pytest.param(SampledSoftmaxLoss, marks=pytest.mark.slow),
    ],
)
def test_compiled_predictions(kind):
    head = layer(kind, prior=COUNTS)

    def predictions(hidden, target):
        left = head.topk(hidden, 3, exclude=target.unsqueeze(1))
        return head.predict(hidden), head.topk(hidden, 3), left, head.rank(hidden, target)

    whole = kind is not FactoredSphericalLoss
    compiled = torch.compile(predictions, backend="aot_eager", fullgraph=whole)
    for m in (4, 9, 1):
        given = rows(m), torch.arange(m)
        torch.testing.assert_close(compiled(*given), predictions(*given), **CLOSE)
