"""n-grams and windows of a text, by hand."""

from __future__ import annotations

import torch

from softsphere_lab.data import text


def test_n_grams_begin_with_the_end_of_a_sentence():
    x, y = text.ngrams(torch.tensor([5, 6, 7]), 3, end=0)
    assert x.tolist() == [[0, 0], [0, 5], [5, 6]]
    assert y.tolist() == [5, 6, 7]


def test_windows_lie_side_by_side_and_a_rest_is_left_out():
    x, y = text.windows(torch.tensor([5, 6, 7, 8, 9]), 2, end=0)
    assert x.tolist() == [[0, 5], [6, 7]]
    assert y.tolist() == [[5, 6], [7, 8]]
