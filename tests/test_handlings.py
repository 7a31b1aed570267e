"""A handling of an output layer gives the same numbers for every kind of layer, or a refusal."""

from __future__ import annotations

import warnings

import pytest
import torch

from _handlings import HANDLINGS
from _registry import Handling
from _subject import LIKE, Subject


def handling_of(name: str, device: str) -> Handling:
    handling = HANDLINGS[name]
    if handling.needs is not None:
        if device != "cpu":
            pytest.skip("each framework is told to use the CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(handling.needs)
    return handling


def run(name: str, kind: str, device: str) -> dict[str, torch.Tensor]:
    handling = handling_of(name, device)
    return handling.run(Subject(kind, handling.bias))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, handling in HANDLINGS.items()
        for kind in LIKE
        if handling.refusal is None and not (handling.like_linear and kind == "clustered")
    ],
)
def test_numbers_are_those_of_a_linear_layer_and_a_criterion(name, kind, device):
    got, want = run(name, kind, device), run(name, LIKE[kind], device)
    assert got.keys() == want.keys()
    for key, value in want.items():
        near = {} if value.dtype == torch.bool else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(got[key], value, **near, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", [n for n, h in HANDLINGS.items() if h.refusal is not None])
def test_what_a_factored_layer_cannot_do_is_refused_before_anything_moves(name, device):
    handling = handling_of(name, device)
    error, words = handling.refusal
    subject = Subject("factored", handling.bias)
    before = subject.numbers()
    with pytest.raises(error, match=words):
        handling.run(subject)
    if handling.unmoved:
        torch.testing.assert_close(subject.numbers(), before, rtol=0, atol=0)
        subject.model.zero_grad()
        subject.train(1)  # and it can go on
