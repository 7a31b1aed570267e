"""Probabilities, best classes and ranks of a large W, read in row chunks: no m × D tensor.

What is to be differentiated, transformed or exported is made of all outputs at once instead, by
plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from softsphere._torch import transforms_active
from softsphere.engines.structured import TWICE
from softsphere.losses import Loss
from softsphere.matrix import FactoredTensor
from softsphere.matrix.factored_matrix import Block

__all__ = [
    "Classes",
    "constant",
    "differentiated",
    "exporting",
    "factored_outputs",
    "log_normaliser",
    "rank",
    "topk",
    "transformed",
]


def exporting() -> bool:
    """Whether torch.export records what is done, for batches of other sizes too."""
    # before torch 2.7 it could not be told from torch.compile
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def transformed() -> bool:
    """Whether this is inside a torch.func transform or forward-mode differentiation, for which
    neither the operators of the engines nor what writes into a new tensor has a rule."""
    if torch.compiler.is_compiling():
        return False
    return transforms_active() or forward_ad._current_level >= 0


def differentiated(*given: Tensor | None) -> bool:
    """Whether autograd records what is computed with these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


@dataclass(frozen=True)
class Classes:
    """W as who has it gives it out.

    chunks(size): (slice of classes, W there) over all classes, `size` rows at a time
    outputs(H): the outputs (m, D) of all classes at once, by plain operations
    num_classes: D
    pi: (D) or None
    loss: what ranks; its numerators if it is a distribution, the outputs otherwise
    """

    chunks: Callable[[int], Iterator[tuple[slice, Tensor]]]
    outputs: Callable[[Tensor], Tensor]
    num_classes: int
    pi: Tensor | None
    loss: Loss

    def scores(self, o: Tensor, pi: Tensor | None) -> Tensor:
        """log(π t(o)), or o: what orders the classes of a row."""
        if not self.loss.normalised:
            return o
        log_t = self.loss.log_numerator(o)
        return log_t if pi is None else log_t + pi.to(log_t.dtype).log()

    def every_score(self, H: Tensor) -> Tensor:
        """The scores of all classes at once: (m, D)."""
        return self.scores(self.outputs(H), self.pi)

    def stream(self, H: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of classes, scores there (m, ·)), about 32 MiB at a time."""
        if exporting():
            # the number of chunks would depend on that of rows
            yield slice(0, self.num_classes), self.every_score(H)
            return
        size = max(1, min(self.num_classes, (8 << 20) // max(*H.shape, 1)))
        for part, rows in self.chunks(size):
            yield part, self.scores(H @ rows.mT, None if self.pi is None else self.pi[part])


def topk(classes: Classes, H: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, best first, and their classes: (m, k) each."""
    best = H.new_full((H.shape[0], 0), -torch.inf)
    index = torch.empty(H.shape[0], 0, dtype=torch.long, device=H.device)
    for part, scores in classes.stream(H):
        values, places = scores.topk(min(k, scores.shape[1]), dim=1)
        best, index = torch.cat([best, values], 1), torch.cat([index, places + part.start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, order)
    return best, index


def rank(classes: Classes, H: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """1 + the number of other classes whose score is not below or at own (m), the target's: (m).

    What is not a number is so behind all that is.
    """
    above = torch.zeros_like(target, dtype=torch.long)
    for part, scores in classes.stream(H):
        better = ~(scores <= own.unsqueeze(1))
        # not the target itself, whose score here may differ from `own` in the last digit
        place = (target - part.start).clamp(0, better.shape[1] - 1)
        at_target = better.gather(1, place.unsqueeze(1).long()).squeeze(1)
        here = (target >= part.start) & (target < part.stop)
        above = above + better.sum(1) - (at_target & here).long()
    return above + 1


def log_normaliser(classes: Classes, H: Tensor) -> Tensor:
    """log Σ_k π_k t(o_k) of each row from the outputs themselves: (m)."""
    total = H.new_full((H.shape[0],), -torch.inf)
    for _, scores in classes.stream(H):
        total = torch.logaddexp(total, scores.logsumexp(1))
    return total


def factored_outputs(H: Tensor, weight: FactoredTensor, classes: Tensor | None = None) -> Tensor:
    """H Wᵀ of rows H (m, w): (m, D), or (m, n) of the given classes (n).

    The gradient with respect to the weight, which is diag(√π) W, is a dense tensor (D, w), and is
    made only where autograd goes there. There is no second derivative.
    """
    link = ByWeight.apply(weight, H.detach(), classes)  # type: ignore[no-untyped-call]
    return ByHidden.apply(H, link, weight.block, classes)  # type: ignore[no-untyped-call,no-any-return]


class ByHidden(torch.autograd.Function):
    """o = H Wᵀ, with ∂H = g W; the link gets g for the gradient with respect to the weight."""

    @staticmethod
    def forward(ctx: Any, H: Tensor, link: Tensor, block: Block, classes: Tensor | None) -> Tensor:
        ctx.block, ctx.edition = block, block.matrix.edition
        ctx.save_for_backward(classes)
        W = block.matrix.arrays
        if classes is not None:
            return H @ W.rows(classes, block.columns).mT
        o = H.new_empty(H.shape[0], W.num_rows)
        for part, rows in W.chunks(columns=block.columns):
            o[:, part] = H @ rows.mT
        return o

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        if ctx.block.matrix.edition != ctx.edition:
            raise RuntimeError(
                "the factored weight has been changed since these outputs were computed; call "
                "backward before the optimizer's step, or compute them anew"
            )
        if not ctx.needs_input_grad[0]:
            return None, g, None, None
        (classes,) = ctx.saved_tensors
        W, columns = ctx.block.matrix.arrays, ctx.block.columns
        with torch.autocast(g.device.type, enabled=False):
            if classes is not None:
                return g @ W.rows(classes, columns), g, None, None
            dH = g.new_zeros(g.shape[0], W.width)
            for part, rows in W.chunks(columns=columns):
                dH.addmm_(g[:, part], rows)
        return dH, g, None, None


class ByWeight(torch.autograd.Function):
    """Zeros in the shape of o = H Wᵀ, whose gradient g becomes that of diag(√π) W: gᵀ H / √π.

    A function apart, since one that has several inputs computes the gradients of all of them.
    """

    @staticmethod
    def forward(ctx: Any, weight: FactoredTensor, H: Tensor, classes: Tensor | None) -> Tensor:
        ctx.block = weight.block
        ctx.save_for_backward(H, classes)
        n = weight.shape[0] if classes is None else classes.shape[0]
        return H.new_zeros(()).expand(H.shape[0], n)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        H, classes = ctx.saved_tensors
        W = ctx.block.matrix.arrays
        with torch.autocast(g.device.type, enabled=False):
            dW = g.mT @ H
        if classes is not None:
            dW = dW.new_zeros(W.num_rows, W.width).index_add_(0, classes, dW)
        return dW if W.pi is None else dW / W.pi.sqrt().unsqueeze(1), None, None


def constant(x: Tensor, weight: FactoredTensor) -> Tensor:
    """x, computed with a weight that is constant to torch.func transforms and forward-mode
    derivatives: a gradient with respect to it, which such an x does not have, is refused."""
    return x + Refused.apply(weight)  # type: ignore[no-untyped-call,no-any-return]


class Refused(torch.autograd.Function):
    """A zero without a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return torch.zeros((), dtype=weight.dtype, device=weight.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise RuntimeError(TWICE)
