"""The network over the items of users."""

from __future__ import annotations

import torch

from softsphere_lab.models.item_networks import ItemAverage, item_embedding, lists_padded


def test_a_hidden_state_is_the_direction_of_the_sum_of_the_embeddings():
    torch.manual_seed(0)
    model = ItemAverage(item_embedding(9, 4), length=3.0, dropout=0.5).eval()
    hidden = model(torch.tensor([2, 8, 2, 5]), torch.tensor([3, 0, 1]))
    E = model.embedding.weight
    for row, items in ((0, [2, 8, 2]), (2, [5])):
        total = sum(E[k] for k in items)
        torch.testing.assert_close(hidden[row], 3 * total / total.norm())
    assert not hidden[1].any()


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    model = ItemAverage(item_embedding(9, 40), length=3.0, dropout=0.5)
    items, lengths = torch.tensor([2, 8]), torch.tensor([2])
    assert (model(items, lengths) == 0).any()
    assert not (model.eval()(items, lengths) == 0).any()


def test_no_lists_and_empty_ones_have_tables():
    none = torch.empty(0, dtype=torch.long)
    assert lists_padded(none, none, 0).shape == (0, 0)
    assert lists_padded(none, none, 3).shape == (3, 0)
