"""Losses as they are written on the command line: what is read back, and what is one loss."""

from __future__ import annotations

import pytest

from softsphere_lab.errors import LabError
from softsphere_lab.study.spec import LossSpec, distinct


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("spherical_softmax:eps=0.01", "spherical_softmax:eps=0.01"),
        ("spherical_softmax:eps=0.123456789012", "spherical_softmax:eps=0.123456789012"),
        ("z_loss:a=1:b=2", "z_loss:a=1:b=2"),
        ("z_loss:b=2.0:a=1e6", "z_loss:a=1000000:b=2"),
        ("z_loss:a=1e30", "z_loss:a=1e+30"),
        ("higher_taylor_softmax:order=4", "higher_taylor_softmax:order=4"),
    ],
)
def test_what_is_written_is_read_back_as_the_same_numbers(text, written):
    spec = LossSpec.parse(text)
    assert str(spec) == written
    assert LossSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("texts", "alone", "tuned"),
    [
        (("z_loss:a=1:b=4", "z_loss:b=4:a=1"), 1, 1),
        (("z_loss", "z_loss:a=1:b=4"), 1, 2),
        (("z_loss:a=1", "z_loss:b=4"), 1, 2),
        (("higher_taylor_softmax", "higher_taylor_softmax:order=4"), 1, 1),
        (("z_loss:a=1", "z_loss:a=2"), 2, 2),
        (("softmax", "taylor_softmax"), 2, 2),
    ],
)
def test_two_spellings_are_one_loss_unless_only_one_of_them_is_searched(texts, alone, tuned):
    specs = [LossSpec.parse(text) for text in texts]
    assert len(distinct(specs, tune=False)) == alone
    assert len(distinct(specs, tune=True)) == tuned
    assert distinct(specs, tune=False)[0] is specs[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("z_loss:a=1:a=2", "z_loss was given a twice"),
        ("higher_taylor_softmax:order=4.0", "order must be an integer, got '4.0'"),
        ("spherical_softmax:eps=1e-46", "eps must be within the range of float32"),
        ("z_loss:a=1e39", "a must be within the range of float32"),
        ("z_loss:b=nan", "b must be finite"),
    ],
)
def test_what_no_network_could_use_is_refused(text, words):
    with pytest.raises(LabError, match=words):
        LossSpec.parse(text)


def test_a_zero_that_was_meant_is_kept():
    assert LossSpec.parse("z_loss:b=0").given == (("b", 0.0),)
