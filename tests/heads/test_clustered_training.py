"""What users do to a clustered layer with PyTorch's tools gives the numbers of plain operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from _clustered import MIXED, layer
from _clustered_tools import TOOLS, Model, Plain, batches, steps

ORDINARY = ({}, {"engine": "gram"}, {"leaf_features": 3})
FACTORED = {"engine": "factored"}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in TOOLS for options in ORDINARY]
    + [(name, FACTORED) for name, tool in TOOLS.items() if tool.refusal is None],
)
def test_numbers_are_those_of_plain_operations(name, options):
    head = layer(MIXED, **options)
    models = Model(head), Model(Plain(head))
    for model in models:
        TOOLS[name].use(model)
    ours, plain = (dict(model.named_parameters()) for model in models)
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(
            ours[key].to_dense(), value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", [name for name, tool in TOOLS.items() if tool.refusal])
def test_what_factored_leaves_cannot_do_is_refused_before_anything_moves(name):
    model = Model(layer(MIXED, **FACTORED))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    kind, words = TOOLS[name].refusal
    with pytest.raises(kind, match=words):
        TOOLS[name].use(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.5))  # and it can go on


# these optimizers make sparse tensors without saying whether to check them
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    "make",
    [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad],
    ids=["SGD", "SparseAdam", "Adagrad"],
)
def test_sparse_gradients_train_with_the_optimizers_that_take_them(make):
    head = layer(MIXED, sparse=True)
    models = Model(head), Model(Plain(head))
    for model in models:
        sparse = model is models[0]
        rest = [*model.trunk.parameters(), *model.head.root.parameters()]
        rate = torch.optim.SGD(rest, lr=0.5)
        kind = make if sparse or make is not torch.optim.SparseAdam else torch.optim.Adam
        # a small eps, since these two add it at different places
        own = kind(
            [model.head.weight], lr=0.05, **({} if make is torch.optim.SGD else {"eps": 1e-30})
        )
        x, target = batches()[0]
        model(x, target).backward()
        assert model.head.weight.grad.is_sparse == sparse
        rate.step()
        own.step()
    touched = (models[1].head.weight.grad != 0).any(1)
    found, want = models[0].head.weight, models[1].head.weight
    torch.testing.assert_close(found[touched], want[touched], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[~touched], head_before(~touched), rtol=0, atol=0)


def head_before(some: Tensor) -> Tensor:
    return layer(MIXED).weight[some]


def test_an_optimizer_that_takes_no_sparse_gradient_says_so():
    model = Model(layer(MIXED, sparse=True))
    with pytest.raises(RuntimeError, match="SparseAdam"):
        steps(model, torch.optim.Adam(model.parameters()))
