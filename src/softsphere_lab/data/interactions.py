"""Which users were seen with which items: lists of items, numbered from the commonest item."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softsphere_lab.data.sources import chosen, digest, local
from softsphere_lab.errors import LabError

__all__ = ["Interactions", "ItemLists", "generated", "load"]

PARTS = ("train", "validation", "test")
# The sets that a folder may have.
SETS = ("gowalla",)


@dataclass(frozen=True)
class ItemLists:
    """A list of items for each user, one after the other.

    starts: (U + 1) where each user's list begins in items, and where the last one ends.
    items: (N) numbers of items.
    """

    starts: Tensor
    items: Tensor

    @classmethod
    def of(cls, lists: Iterable[Iterable[int]]) -> ItemLists:
        """Returns the given lists.

        >>> ItemLists.of([[4, 2], [], [7]])
        ItemLists(starts=tensor([0, 2, 2, 3]), items=tensor([4, 2, 7]))
        """
        every = [list(items) for items in lists]
        lengths = torch.tensor([0, *map(len, every)])
        return cls(lengths.cumsum(0), torch.tensor([k for items in every for k in items]).long())

    @property
    def lengths(self) -> Tensor:
        """How many items each user has: (U)."""
        return self.starts.diff()

    def of_users(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the items of some users (m), and for each item the place of its user in them.

        >>> ItemLists.of([[4, 2], [], [7]]).of_users(torch.tensor([2, 0]))
        (tensor([0, 1, 1]), tensor([7, 4, 2]))
        """
        lengths = self.lengths[users]
        place = torch.repeat_interleave(torch.arange(len(users), device=users.device), lengths)
        first = self.starts[users] - (lengths.cumsum(0) - lengths)
        return place, self.items[torch.arange(len(place), device=users.device) + first[place]]

    def and_then(self, other: ItemLists) -> ItemLists:
        """Returns lists that have the items of both.

        >>> ItemLists.of([[4], [7]]).and_then(ItemLists.of([[2], [1]])).items
        tensor([4, 2, 7, 1])
        """
        users = torch.arange(len(self.lengths))
        place, items = (
            torch.cat(both)
            for both in zip(self.of_users(users), other.of_users(users), strict=True)
        )
        lengths = self.lengths + other.lengths
        order = place.argsort(stable=True)
        return ItemLists(torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]), items[order])

    def to(self, device: str) -> ItemLists:
        return ItemLists(self.starts.to(device), self.items.to(device))


@dataclass(frozen=True)
class Interactions:
    """The items of each user in three parts, numbered from the commonest in the training part."""

    num_items: int
    train: ItemLists
    valid: ItemLists
    test: ItemLists

    @property
    def counts(self) -> Tensor:
        """How often each item occurs in the training part: (D); 1 for one that does not."""
        return torch.bincount(self.train.items, minlength=self.num_items).clamp_min(1).float()

    def joined(self) -> Interactions:
        """Returns the same with the validation part added to the training part."""
        return replace(self, train=self.train.and_then(self.valid))

    def fingerprint(self) -> dict[str, Any]:
        """Returns what distinguishes this data from other data of the same name, for a record."""
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            "users": len(self.train.lengths),
            "items": self.num_items,
            **{name: len(part.items) for name, part in parts.items()},
            "sha256": digest(*(x for part in parts.values() for x in (part.starts, part.items))),
        }


def load(name: str, folder: Path | None = None) -> Interactions:
    """Returns the interactions of that name.

    folder: with NAME/train.parquet, NAME/validation.parquet and NAME/test.parquet, whose columns
    are "user" and "items", a list; by default the environment variable SOFTSPHERE_DATA. "generated"
    needs no folder.
    Raises LabError for an unknown set and for one that cannot be read, and says what would help.
    """
    if name == "generated":
        return generated()
    if name not in SETS:
        known = ", ".join((*SETS, "generated"))
        raise LabError(f"the interactions that are known are {known}, got {name!r}")
    found = chosen(folder)
    if found is None:
        raise LabError(
            f"give a folder by --data-dir that holds {name}/train.parquet, "
            f"{name}/validation.parquet and {name}/test.parquet with the columns user and items"
        )
    rows = local(found, name, PARTS)
    return _numbered([_lists(rows[part], f"--data-dir {found}: {name}/{part}") for part in PARTS])


def _lists(rows: Any, source: str) -> dict[int, list[int]]:
    """The items of each user of a part."""
    if not {"user", "items"} <= {*rows.column_names}:
        came = ", ".join(rows.column_names)
        raise LabError(f"{source} must have the columns user and items, got {came}")
    return dict(zip(rows["user"][:], rows["items"][:], strict=True))


def _numbered(parts: list[dict[int, list[int]]]) -> Interactions:
    """The parts with users and items numbered anew, of equally common items the lower one first."""
    users = sorted({user for part in parts for user in part})
    lists = [ItemLists.of(part.get(user, []) for user in users) for part in parts]
    known = np.unique(np.concatenate([each.items.numpy() for each in lists]))
    if len(users) < 1 or not len(lists[0].items):
        raise LabError("the interactions have no item to train on")
    places = [torch.from_numpy(np.searchsorted(known, each.items.numpy())) for each in lists]
    order = torch.bincount(places[0], minlength=len(known)).argsort(descending=True, stable=True)
    number = order.argsort()
    train, valid, test = (
        ItemLists(each.starts, number[place]) for each, place in zip(lists, places, strict=True)
    )
    return Interactions(len(known), train, valid, test)


# The generated interactions: how many users and items there are, how many groups both belong to,
# and how many items a user has in each part.
USERS, ITEMS, GROUPS = 300, 120, 6
SIZES = (10, 2, 4)


def generated() -> Interactions:
    """Users who like the items of one group in nine cases of ten, without repeating any.

    They are the same on every machine, since all chance comes from random.Random(0).random().
    """
    uniform = random.Random(0).random
    parts: list[dict[int, list[int]]] = [{}, {}, {}]
    for user in range(USERS):
        liked: list[int] = []
        while len(liked) < sum(SIZES):
            item = int(ITEMS * uniform())
            if item not in liked and (item % GROUPS == user % GROUPS or uniform() < 0.1):
                liked.append(item)
        for part, size in zip(parts, SIZES, strict=True):
            part[user] = [liked.pop() for _ in range(size)]
    return _numbered(parts)
