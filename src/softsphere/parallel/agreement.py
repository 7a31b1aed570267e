"""Ranks agree before a layer computes: an error or a difference on one is an error on all."""

from __future__ import annotations

import zlib
from types import TracebackType
from typing import Any

import torch

from softsphere._torch import graph_is_captured
from softsphere.parallel.ranks import Ranks

__all__ = ["Agreement"]

# Facts in one message. The size is fixed, so that different actions can be told apart.
_FACTS = 24


class Agreement:
    """Collects facts inside a `with` block, and compares them over the ranks when it ends.

    It costs one message of 208 bytes. If the block raises an error on one rank, that error goes on
    there, and every other rank raises RuntimeError with its text. Facts given to `same` must be
    equal on all ranks; otherwise each raises ValueError with the values of all. Inside the block no
    rank may send anything.

    Args:
        ranks: the ranks.
        action: what they are about to do, which must be the same.
    """

    def __init__(self, ranks: Ranks, action: str) -> None:
        self.ranks, self.action = ranks, action
        # whether the ranks are in an agreement around this one
        self._around = False
        self._same: dict[str, Any] = {}
        self._each: dict[str, int] = {}
        # the facts given to `each`, of every rank
        self.found: dict[str, list[int]] = {}

    def same(self, **facts: Any) -> None:
        """Adds facts that must be equal on all ranks."""
        self._same |= facts

    def each(self, **facts: int) -> None:
        """Adds integers that may differ, which `found` lists after the block."""
        self._each |= facts

    def __enter__(self) -> Agreement:
        if graph_is_captured():
            raise RuntimeError(
                "a layer with a process_group cannot be captured in a CUDA graph, since its ranks "
                "compare their arguments at every call; step it without CapturedStep"
            )
        self.ranks.settle()
        self._around, self.ranks.agreeing = self.ranks.agreeing, True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ranks.agreeing = self._around
        if error is not None and not isinstance(error, Exception):
            return
        row = torch.zeros(2 + _FACTS, dtype=torch.int64, device="cpu")
        row[0] = int(error is not None)
        row[1] = _digest((self.action, sorted(self._same), sorted(self._each)))
        same = {name: _digest(value) for name, value in sorted(self._same.items())}
        facts = [*same.values(), *(value for _, value in sorted(self._each.items()))]
        assert len(facts) <= _FACTS
        row[2 : 2 + len(facts)] = row.new_tensor(facts)
        table = self.ranks.gather(row.to(self.ranks.device)).cpu()
        compared = table[:, 1 : 2 + len(same)]
        if bool(table[:, 0].any()) or not bool((compared == compared[0]).all()):
            self._refuse(error)
        for i, name in enumerate(sorted(self._each)):
            self.found[name] = table[:, 2 + len(same) + i].tolist()

    def _refuse(self, error: BaseException | None) -> None:
        """Raises on every rank, with what the others say."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        told = self.ranks.objects((text, self.action, {k: repr(v) for k, v in self._same.items()}))
        if error is not None:
            return  # it goes on
        for rank, (failed, _, _) in enumerate(told):
            if failed is not None:
                raise RuntimeError(
                    f"rank {rank} of the process group refused what it was given, so that nothing "
                    f"was computed or changed on any rank. Its error is {failed}"
                )
        actions = [action for _, action, _ in told]
        if len(set(actions)) > 1:
            raise RuntimeError(
                "all ranks of the process group must do the same, but they began "
                f"{_listed(actions)}; nothing was computed or changed"
            )
        for name in told[0][2]:
            values = [facts.get(name) for _, _, facts in told]
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name} must be the same on all ranks of the process group, got "
                    f"{_listed(values)}; nothing was computed or changed"
                )
        raise RuntimeError("the ranks of the process group disagree; nothing was computed")


def _digest(value: Any) -> int:
    """32 bits of a fact that are the same in every process."""
    return zlib.crc32(repr(value).encode())


def _listed(values: list[Any]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
