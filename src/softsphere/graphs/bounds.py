"""What indices have to be, which PyTorch's own operations check and compiled ones need not.

A compiled program that meets a wrong index may end the process, or leave what it writes half done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Bound", "bounds"]

_ALONG_A_DIMENSION = {
    *("gather", "index_select", "index_add", "index_add_", "index_copy", "index_copy_"),
    *("index_fill", "index_fill_", "scatter", "scatter_", "scatter_add", "scatter_add_"),
}


class Bound(NamedTuple):
    """Where indices have to be: from `least`, and below `end`, or what is ignored."""

    indices: Tensor
    least: int
    end: int
    what: str
    ignored: int | None = None

    def hold(self) -> Tensor:
        """Whether they are, a boolean ()."""
        within = (self.indices >= self.least) & (self.indices < self.end)
        return (within if self.ignored is None else within | (self.indices == self.ignored)).all()

    @property
    def message(self) -> str:
        """The error if they are not."""
        besides = "" if self.ignored is None else f" or {self.ignored}"
        return f"{self.what} must be in [{self.least}, {self.end}){besides}"


def bounds(name: str, args: tuple[Any, ...]) -> Iterator[Bound]:
    """The bounds of the indices of an operation, by its name without the namespace."""
    if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
        yield Bound(args[1], 0, args[0].shape[0], "an input of an embedding")
    elif name in ("nll_loss_forward", "nll_loss2d_forward"):
        target, ignored = args[1], args[4]
        yield Bound(target, 0, args[0].shape[1 if args[0].dim() > 1 else 0], "target", ignored)
    elif name in _ALONG_A_DIMENSION:
        size = args[0].shape[args[1]] if args[0].dim() else 1
        yield Bound(args[2], 0, size, f"the index of {name}")
    elif name in ("index", "index_put", "index_put_"):
        for dim, index in enumerate(args[1]):
            if isinstance(index, Tensor):
                size = args[0].shape[dim]
                yield Bound(index, -size, size, "an index")
