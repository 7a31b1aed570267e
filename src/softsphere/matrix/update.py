"""What a step adds to the factors, and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from softsphere.equal_indices import Places
from softsphere.matrix.abstract import POWER
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.precision import is_asynchronous
from softsphere.unread import values_are_unread

__all__ = ["SingularStepError", "SmallIncrements", "Update"]

_NAMES = ("U_inv", "centred_gram", "U", "omega", "colsum")


class SingularStepError(RuntimeError):
    """A step of a factored weight cannot be taken. The weight is as it was before.

    The gradient or a factor is not finite, or the step is singular or nearly so: it would take all
    of a direction of W away. The message says which. A smaller learning rate, or clipping of the
    gradient, helps if the numbers themselves are finite.
    """


class SmallIncrements(Mapping[str, Tensor]):
    """What is added to each small array, by its name, in the memory of one tensor.

    So a GPU needs one launch to look at all of them, and one to change them. A program that is
    compiled on a CPU would ask at each number which of them it belongs to.

    memory: (3w + 2, w) the rows of all, or a few tensors that have them
    images: (w + 2, w) those of U, ω and w̄, which are rows times R
    """

    def __init__(self, w: int, like: Tensor) -> None:
        self.memory: tuple[Tensor, ...]
        rows = [w, w, w + 2]
        if like.device.type == "cpu" and values_are_unread():
            self.memory = tuple(like.new_empty(n, w) for n in rows)
            U_inv, gram, self.images = self.memory
        else:
            self.memory = (like.new_empty(sum(rows), w),)
            U_inv, gram, self.images = self.memory[0].split(rows)
        U, omega, colsum = self.images[:w], self.images[w], self.images[w + 1]
        each = (U_inv, gram, U, omega, colsum)
        self.each: dict[str, Tensor] = dict(zip(_NAMES, each, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        return self.each[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)


@dataclass(frozen=True)
class Update:
    """What is added to the rows of V, and to each small array after κ has acted on it.

    rows: (n) the targets, whose rows of V change
    to_rows: (n, w) what is added to them
    to_small: what is added to the small arrays
    scaled: the small arrays after κ; empty where κ is a number and can act in place
    blocks: κ and the spread of the gradient over the blocks
    carried: (n, w) the rows of V in the current coordinates; None where they are in them already
    places: those of the targets, where all of their rows are here
    refused: why the step cannot be taken; None where it can
    flag: on a GPU, whether this or an earlier step was left out
    undone: on a GPU, whether this step was left out, to be computed again, since its inverse was
        not found by products or since it would wear the factors out
    deviation: on a GPU, the deviation of S from I; see `inverse`
    share: the smallest pivot of S, about the share that is left of the direction that the step
        shrinks most; 1 on a GPU, where it is not read
    """

    rows: Tensor
    to_rows: Tensor
    to_small: SmallIncrements
    scaled: dict[str, Tensor]
    blocks: Blocks
    carried: Tensor | None = None
    places: Places | None = None
    refused: str | None = None
    flag: Tensor | None = None
    undone: Tensor | None = None
    deviation: Tensor | None = None
    share: float = 1.0

    def commit(self, W: Arrays) -> None:
        """Writes the update in place; no large tensor is allocated."""
        W.begin_step()
        rows, which = W.own_targets(self.rows)
        if self.carried is not None:
            W.V[rows] = self.carried[which]
            W.generations.made.index_fill_(0, rows, W.generations.now)
        W.V.add(rows, self.to_rows[which], self.places)
        if not self.blocks.is_identity:
            for name in self.to_small:
                if name in self.scaled:
                    W.put(name, self.scaled[name])
                else:
                    W.scale(name, self.blocks.base[0][0] ** POWER[name])
        # A GPU may run these operations again as they are, whatever was summed apart by then.
        apart = self.blocks.is_identity and not is_asynchronous(W.device)
        W.add(self.to_small, self.share, apart=apart)
        W.renamed()
        W.changed()

    def after(self, W: Arrays, name: str, diagonal: bool = False) -> Tensor:
        """Returns the value that a small array, or its diagonal, will have after the step."""
        change, scaled = self.to_small[name], self.scaled.get(name)
        before: Tensor
        if diagonal:
            before = W.diagonal(name) if scaled is None else scaled.diagonal()
            change = change.diagonal()
        else:
            before = getattr(W, name) if scaled is None else scaled
        if scaled is not None or self.blocks.is_identity:
            return before + change
        return before * self.blocks.base[0][0] ** POWER[name] + change
