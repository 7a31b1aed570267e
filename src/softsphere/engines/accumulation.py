"""One Gram matrix and one dense gradient for many batches of the same weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softsphere.engines import moments
from softsphere.engines.gram import chunk_size
from softsphere.engines.moments import Gradients, Moments
from softsphere.engines.options import LinearSphericalOptions
from softsphere.engines.weight import accumulator, scatter
from softsphere.stats import Stats

__all__ = ["Accumulation"]


class Accumulation:
    """The gram engine of a weight that stays as it is while gradients accumulate.

    The moments are computed once. A backward adds its A (d, d), v (d) and target rows here, and
    `finish` adds what they come to, in one pass over W, to the gradients of W and b: 4 D d² FLOPs
    however many batches there were.
    """

    def __init__(
        self,
        W: Tensor,
        b: Tensor | None,
        pi: Tensor | None,
        *,
        centred: bool,
        options: LinearSphericalOptions,
    ) -> None:
        self.W, self.b, self.centred, self.options = W, b, centred, options
        self.dtype = accumulator(W, W, options.accumulate_dtype)
        self.size = chunk_size(W, options.class_chunk)
        self.pi = None if pi is None else pi.to(self.dtype)
        self.given_pi = pi
        self.versions, self.sample = self.current_versions(), self.current_sample()
        self.moments: Moments | None = None
        self.small: tuple[Tensor, Tensor] | None = None
        self.entries: list[tuple[Tensor, Tensor, Tensor]] = []
        self.open = True

    def current_versions(self) -> list[int]:
        return [x._version for x in (self.W, self.b, self.given_pi) if x is not None]

    def current_sample(self) -> Tensor:
        """Some rows of W, since fused optimizers do not tell its version that they change it."""
        return self.W.detach()[:: max(1, len(self.W) // 16)].clone()

    def is_of(self, W: Tensor, b: Tensor | None, pi: Tensor | None) -> bool:
        """Whether these are what this was begun with."""
        return W is self.W and b is self.b and pi is self.given_pi

    def check(self) -> None:
        """Raises: RuntimeError where this is over, or the weight or bias has been changed."""
        if not self.open:
            raise RuntimeError(
                "backward of a loss that was computed inside accumulate() was called after it; "
                "call backward inside"
            )
        if self.current_versions() != self.versions:
            raise RuntimeError(
                "the weight, bias or prior has been changed inside accumulate(), so its Gram "
                "matrix is that of another one; step the optimizer after the context, not inside"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def statistics(self, H: Tensor, target: Tensor) -> Stats:
        """Statistics of H (m, d) for targets (m, K), in O(m d²) but for the first time."""
        self.check()
        if self.moments is None:
            with torch.no_grad(), torch.autocast(H.device.type, enabled=False):
                self.moments = moments.moments(
                    self.W, self.b, self.pi, self.centred, self.size, self.dtype
                )
        batch = Batch(self)
        anchor = Commit.apply(batch, self.W, self.b)  # type: ignore[no-untyped-call]
        s, q, c = KeptStatistics.apply(H, anchor, target, batch)  # type: ignore[no-untyped-call]
        pi = None if self.pi is None else self.pi[target]
        return Stats(s, q, c, float(len(self.W)), pi=pi)

    def add(self, H: Tensor, target: Tensor, g: Gradients) -> None:
        """What one batch gives to the gradient."""
        assert self.moments is not None
        with torch.autocast(H.device.type, enabled=False):
            A, v = moments.small_gradient(H, self.moments, g, len(self.W))
        self.small = (A, v) if self.small is None else (self.small[0] + A, self.small[1] + v)
        # a copy, since whose the rows are may write over them after the backward
        self.entries.append((H.clone(), target, g.c))

    @torch.no_grad()
    def finish(self) -> None:
        """Adds what there is to the gradients of W and b."""
        self.check()
        if self.small is None or self.moments is None:
            return
        if not torch.equal(self.sample, self.current_sample()):
            raise RuntimeError(
                "the weight has been changed inside accumulate(), so what was computed since is of "
                "another one, and nothing is added; step the optimizer after the context"
            )
        W, b, fresh = self.W, self.b, self.W.grad is None
        # an embedding that is tied to it may have left a sparse one
        dW, db = W.grad.to_dense() if W.grad is not None and W.grad.is_sparse else W.grad, None
        if fresh and W.requires_grad:
            dW = torch.empty(W.shape, dtype=W.dtype, device=W.device)
        if b is not None and b.requires_grad:
            db = torch.zeros_like(b) if b.grad is None else b.grad
        out = dW if W.requires_grad else None, db
        with torch.autocast(W.device.type, enabled=False):
            shift = self.moments.shift
            moments.dense_gradient(W, b, self.pi, shift, self.small, out, self.size, fresh=fresh)
            for H, target, gc in self.entries:
                scatter(out, H, target, gc, self.options.deterministic)
        for x, grad in ((W, dW), (b, db)):
            if x is not None and grad is not None:
                x.grad = grad

    def close(self) -> None:
        """Forgets all; a graph that still refers to this can go no further."""
        self.open, self.moments, self.small, self.entries = False, None, None, []


@dataclass
class Batch:
    """Carries one use of the weight from its backward to the commitment of it."""

    accumulation: Accumulation
    pending: tuple[Tensor, Tensor, Gradients] | None = None


class Commit(torch.autograd.Function):
    """Stands for W and b in the graph, so that a gradient is only recorded where theirs is wanted:
    not by torch.autograd.grad for something else."""

    @staticmethod
    def forward(ctx: Any, batch: Batch, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.batch = batch
        return W.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None, None]:
        pending, ctx.batch.pending = ctx.batch.pending, None
        ctx.batch.accumulation.add(*pending)
        return None, None, None


class KeptStatistics(torch.autograd.Function):
    """s, q (m) and c (m, K) from kept moments."""

    @staticmethod
    def forward(
        ctx: Any, H: Tensor, anchor: Tensor, target: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        a = batch.accumulation
        assert a.moments is not None
        with torch.autocast(H.device.type, enabled=False):
            s, q, c, P = moments.statistics(H, a.W, a.b, target, a.moments)
        ctx.batch = batch
        ctx.save_for_backward(H, target, P)
        return s, q, c

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor
    ) -> tuple[Tensor | None, Tensor, None, None]:
        a = ctx.batch.accumulation
        a.check()
        H, target, P = ctx.saved_tensors
        g, back = Gradients(gs, gq, gc), None
        ctx.batch.pending = H, target, g
        if ctx.needs_input_grad[0]:
            with torch.autocast(H.device.type, enabled=False):
                back = moments.hidden_gradient(a.W, target, P, a.moments, g).to(H.dtype)
        return back, gs.new_zeros(()), None, None
