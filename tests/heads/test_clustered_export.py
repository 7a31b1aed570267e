"""Predictions of clustered layers in exported programs."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from _clustered import ASSIGNMENTS, D, layer, rows
from _ranks import TIGHT

SOME = torch.tensor([0, 5, 5, D - 1])
ASKED = {
    "log_prob": lambda head, hidden: head.log_prob(hidden),
    "some": lambda head, hidden: head.log_prob(hidden, SOME),
    "predict": lambda head, hidden: head.predict(hidden),
    "topk": lambda head, hidden: head.topk(hidden, 3),
    "excluding": lambda head, hidden: head.topk(hidden, 3, SOME.expand(hidden.shape[0], -1)),
    # torch 2.6 exports hidden[:, 0] for most numbers of rows, and not for all
    "rows": lambda head, hidden: head.rows((hidden.select(1, 0) > 0).long() * (D - 1)),
}


class Asked(nn.Module):
    def __init__(self, head, ask):
        super().__init__()
        self.head, self.ask = head, ask

    def forward(self, hidden):
        return self.ask(self.head, hidden)


def exported(head, ask, strict=False):
    sizes = ({0: torch.export.Dim("m")},)
    module = Asked(head, ask)
    return torch.export.export(module, (rows(4),), dynamic_shapes=sizes, strict=strict).module()


# An export takes about a second.
EVERY = [
    *(("mixed", what) for what in ASKED),
    *((name, "topk") for name in ("empty clusters", "no shortlist")),
    *(("all shortlist", what) for what in ("topk", "rows")),
    *(
        pytest.param(name, what, marks=pytest.mark.slow)
        for name in ("clusters of one", "one cluster", "one class of the shortlist")
        for what in ("topk", "rows")
    ),
]


@pytest.mark.parametrize(("name", "what"), EVERY)
def test_an_exported_layer_takes_batches_of_any_size(name, what):
    head, ask = layer(ASSIGNMENTS[name], counts=torch.arange(1.0, D + 1)).eval(), ASKED[what]
    program = exported(head, ask)
    for m in (1, 2, 7, 60):
        hidden = rows(m, seed=m)
        torch.testing.assert_close(program(hidden), ask(head, hidden), **TIGHT)


@pytest.mark.parametrize("leaf", ["softmax", "spherical_softmax"])
def test_any_leaf_with_a_projection_is_exported(leaf):
    head = layer(ASSIGNMENTS["mixed"], leaf=leaf, leaf_features=3).eval()
    program = exported(head, ASKED["log_prob"])
    torch.testing.assert_close(program(rows(7)), head.log_prob(rows(7)), **TIGHT)


def test_a_layer_that_was_exported_is_what_it_was():
    """Nothing that it keeps is of the trace."""
    head, other = (layer(ASSIGNMENTS["mixed"]) for _ in range(2))
    for what in ("topk", "rows"):
        exported(head, ASKED[what])
    target = torch.arange(D)
    for each in (head, other):
        each(rows(D), target).backward()
    torch.testing.assert_close(head.weight.grad, other.weight.grad, **TIGHT)
    for what, ask in ASKED.items():
        torch.testing.assert_close(ask(head, rows(5)), ask(other, rows(5)), msg=what, **TIGHT)
    assert torch.equal(head.rank(rows(D), target), other.rank(rows(D), target))


def test_what_cannot_be_exported_says_what_can():
    head = layer(ASSIGNMENTS["mixed"])
    with pytest.raises(RuntimeError, match=r"rank of a clustered layer.*export log_prob"):
        exported(head, lambda head, hidden: head.rank(hidden, (hidden[:, 0] > 0).long()))
    factored = layer(ASSIGNMENTS["mixed"], engine="factored")
    with pytest.raises(RuntimeError, match=r"state_dict\(\) of the layer.*engine='auto'"):
        exported(factored, ASKED["topk"])
    head.load_state_dict(factored.state_dict())
    program = exported(head, ASKED["log_prob"])
    torch.testing.assert_close(program(rows(7)), factored.log_prob(rows(7)), **TIGHT)


@pytest.mark.skipif(
    "reason" not in inspect.signature(torch.compiler.disable).parameters,
    reason="before torch 2.7 there was no reason that could be given",
)
def test_strict_mode_names_the_other_one():
    with pytest.raises(Exception, match="strict=False"):
        exported(layer(ASSIGNMENTS["mixed"]), ASKED["topk"], strict=True)
