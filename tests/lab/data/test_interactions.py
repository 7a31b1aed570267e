"""Interactions: their parts, their numbers, and what a folder must have."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from _data_folder import needs_data, write_columns
from softsphere_lab.data import interactions, sources
from softsphere_lab.data.interactions import Interactions, ItemLists
from softsphere_lab.errors import LabError


def lists_of(lists: ItemLists) -> list[list[int]]:
    bounds = lists.starts.tolist()
    return [lists.items[a:b].tolist() for a, b in pairwise(bounds)]


def written(folder, parts: dict[str, dict]):
    """A folder with a set of the name gowalla."""
    pyarrow = pytest.importorskip("pyarrow")
    number = pyarrow.int32()
    kinds = {"user": number, "person": number, "items": pyarrow.list_(number)}
    for part, columns in parts.items():
        arrays = {name: pyarrow.array(values, kinds[name]) for name, values in columns.items()}
        write_columns(folder / "gowalla" / f"{part}.parquet", **arrays)
    return folder


PARTS = {
    "train": {"user": [7, 3], "items": [[50, 20, 40], [40, 20]]},
    "validation": {"user": [3, 7], "items": [[30], [10]]},
    "test": {"user": [3], "items": [[50]]},
}


def test_items_are_numbered_from_the_commonest_and_users_in_order(tmp_path):
    found = interactions.load("gowalla", written(tmp_path, PARTS))
    # counts in the training part: 20 and 40 twice, 50 once, 10 and 30 never
    number = {20: 0, 40: 1, 50: 2, 10: 3, 30: 4}
    assert found.num_items == 5
    assert lists_of(found.train) == [[number[k] for k in x] for x in ([40, 20], [50, 20, 40])]
    assert lists_of(found.valid) == [[number[30]], [number[10]]]
    assert lists_of(found.test) == [[number[50]], []]
    assert found.counts.tolist() == [2, 2, 1, 1, 1]


def test_the_parts_that_are_joined_are_both_trained_on():
    found = Interactions(
        5, ItemLists.of([[1], [], [4, 2]]), ItemLists.of([[3], [0], []]), ItemLists.of([[], [], []])
    )
    assert lists_of(found.joined().train) == [[1, 3], [0], [4, 2]]
    assert found.joined().valid is found.valid


def test_lists_of_users_in_any_order_and_repeated():
    lists = ItemLists.of([[5], [], [3, 4]])
    place, items = lists.of_users(torch.tensor([2, 1, 0, 2]))
    assert place.tolist() == [0, 0, 2, 3, 3]
    assert items.tolist() == [3, 4, 5, 3, 4]


def test_generated_users_like_the_items_of_one_group_and_none_twice():
    found = interactions.load("generated")
    every = zip(lists_of(found.train), lists_of(found.valid), lists_of(found.test), strict=True)
    for parts in every:
        liked = [k for part in parts for k in part]
        assert len({*liked}) == len(liked) == sum(interactions.SIZES)
    assert found.fingerprint() == interactions.generated().fingerprint()


WRONG = {
    "must have the columns user and items, got items, person": {
        part: {"items": [[1]], "person": [1]} for part in PARTS
    },
    "no item to train on": {**PARTS, "train": {"user": [3], "items": [[]]}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_a_folder_lacks_is_told(tmp_path, message):
    with pytest.raises(LabError, match=message):
        interactions.load("gowalla", written(tmp_path, WRONG[message]))


def test_an_unknown_set_and_a_missing_folder_are_told(monkeypatch):
    monkeypatch.delenv(sources.VARIABLE, raising=False)
    with pytest.raises(LabError, match="known are gowalla, generated, got 'movies'"):
        interactions.load("movies")
    with pytest.raises(LabError, match=r"--data-dir that holds gowalla/train.parquet"):
        interactions.load("gowalla")


@needs_data
def test_gowalla_is_the_published_split():
    """Training and validation together are the published training part."""
    found = interactions.load("gowalla").fingerprint()
    assert (found["users"], found["items"]) == (29_858, 40_981)
    assert (found["train"] + found["valid"], found["test"]) == (810_128, 217_242)
