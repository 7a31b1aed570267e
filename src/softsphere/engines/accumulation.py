"""Gradient accumulation with one Gram matrix and one dense gradient for all batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from softsphere._torch import eager, has_gradient_hooks, transformed, values_on_cpu, version_of
from softsphere.engines import moments
from softsphere.engines.accumulation_checks import (
    FIRST_ONLY,
    Both,
    check_wrapper,
)
from softsphere.engines.accumulation_functions import Delivery, KeptStatistics, KeptTotal
from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.moment_gradients import small_gradient, weight_gradients
from softsphere.engines.moments import Moments
from softsphere.engines.options import LinearSphericalOptions
from softsphere.engines.pending import Share, shares_of, waiting, withdraw
from softsphere.engines.quadratic_rows import loses_digits
from softsphere.engines.target_rows import TargetRows, joined
from softsphere.engines.weight import sum_dtype
from softsphere.stats import Stats

__all__ = ["Accumulation"]


class Accumulation:
    """The gram engine for a weight that does not change while gradients accumulate.

    The moments are computed once. Each backward leaves its A (n, n), its v (n) and its rows at the
    targets in the pending `.grad` of W and b. `finish` has autograd deliver the gradients that
    these add up to, in one pass over W. That is 4 D d² FLOPs for any number of batches.
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
        self.dtype = sum_dtype(W, W, options.accumulate_dtype)
        self.pi = None if pi is None else pi.to(self.dtype)
        self.given_pi = pi
        self.versions, self.samples = self.current_versions(), self.current_samples()
        self.trained = self.currently_trained()
        self.moments: Moments | None = None
        self.total: Tensor | None = None
        self.open = True

    def current_versions(self) -> list[int]:
        return [version_of(x) for x in (self.W, self.b, self.given_pi) if x is not None]

    def current_samples(self) -> list[Tensor]:
        """Some entries of each tensor, since a change of `.data` is not counted as a version."""
        given = [x.detach() for x in (self.W, self.b, self.given_pi) if x is not None]
        return [x[:: max(1, len(x) // 16)].clone() for x in given]

    def currently_trained(self) -> Both:
        return self.W.requires_grad, self.b is not None and self.b.requires_grad

    def check_use(
        self,
        W: Tensor,
        b: Tensor | None,
        pi: Tensor | None,
        *,
        centred: bool,
        options: LinearSphericalOptions,
    ) -> None:
        """Checks what a forward computes with.

        Raises RuntimeError if it is not what the accumulation began with, or inside a torch.func
        transform or forward mode.
        """
        if transformed():
            raise RuntimeError(FIRST_ONLY)
        if not (W is self.W and b is self.b and pi is self.given_pi):
            raise RuntimeError(
                "the weight, bias or prior of the layer was replaced after accumulate() began; "
                "leave the context before replacing them"
            )
        if (centred, options) != (self.centred, self.options):
            raise RuntimeError(
                "the loss or the options of the layer were replaced after accumulate() began, "
                "whose Gram matrix is not theirs; leave the context before replacing them"
            )

    def check(self) -> None:
        """Raises RuntimeError if the accumulation is over, or if W, b or π has been changed."""
        if not self.open:
            raise RuntimeError(
                "backward of a loss that was computed inside accumulate() was called after it; "
                "call backward inside"
            )
        if self.current_versions() != self.versions:
            raise RuntimeError(
                "the weight, bias or prior has been changed inside accumulate(), so its Gram "
                "matrix no longer holds; step the optimizer after the context, not inside"
            )
        if self.currently_trained() != self.trained:
            raise RuntimeError(
                "requires_grad of the weight or bias has been changed inside accumulate(); freeze "
                "and unfreeze them before or after the context"
            )

    def check_digits(self, H: Tensor, P: Tensor) -> None:
        """Raises RuntimeError if the statistics of H have lost their digits, with engine "auto".

        It looks only on a CPU, as `gram.guarded_statistics` does.
        """
        assert self.moments is not None
        if self.options.engine != "auto" or not values_on_cpu(P):
            return
        if loses_digits(H, P, self.moments.S):
            raise RuntimeError(
                f"accumulate() computes with the Gram matrix of the weight in {self.dtype}, where "
                "large parts of the outputs of this batch cancel and too few digits are left; use "
                "options=LinearSphericalOptions(accumulate_dtype=torch.float64), or accumulate "
                "without this context"
            )

    @eager("accumulate() keeps statistics between the batches")
    def statistics_of_batch(self, H: Tensor, target: Tensor) -> Stats:
        """The statistics of H (m, d) for targets (m, K), in O(m d²) once the moments are known."""
        self.check()
        check_wrapper()
        if self.moments is None:
            with torch.no_grad(), torch.autocast(H.device.type, enabled=False):
                inputs = self.inputs(H, target)
                size = self.chunk_size(inputs)
                self.moments = moments.moments(inputs, self.centred, size, self.dtype)
        stand = tuple(self.stand_in(x) for x in (self.W, self.b))
        s, q, c = KeptStatistics.apply(H, *stand, target, self)  # type: ignore[no-untyped-call]
        pi = None if self.pi is None else self.pi[target]
        return Stats(s, q, c, float(len(self.W)), pi=pi)

    def total_row(self, compute: Callable[[], Tensor]) -> Tensor:
        """Σ_k π_k [W b]_k (n), which `compute` gives. Its gradient waits as those of batches do."""
        self.check()
        if self.total is None:
            with torch.no_grad():
                self.total = compute()
        W, b = (self.stand_in(x) for x in (self.W, self.b))
        none = self.W.new_empty(0)
        out: Tensor = KeptTotal.apply(none, W, b, none, self)  # type: ignore[no-untyped-call]
        return out

    def stand_in(self, x: Tensor | None) -> Tensor | None:
        """The leaf of a batch's graph that stands for W or b.

        It is the tensor itself, unless hooks wait for its gradient: autograd would run them after
        each batch, which gives no gradient yet. Then it is a leaf of its own.
        """
        if x is None or not (x.requires_grad and self.waited_for()):
            return x
        return torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)

    def waited_for(self) -> bool:
        """Whether there may be hooks on the gradients.

        Hooks of data-parallel wrappers are not visible in Python, but need a process group.
        """
        if distributed.is_available() and distributed.is_initialized():
            return True
        given = [x for x in (self.W, self.b) if x is not None]
        return any(has_gradient_hooks(x) for x in given)

    def inputs(self, H: Tensor, target: Tensor) -> Inputs:
        return Inputs(H, self.W, self.b, target, self.pi)

    def chunk_size(self, inputs: Inputs) -> int:
        """Rows of W in a chunk."""
        return moments.chunk_size(inputs, self.options.class_chunk, self.dtype)

    def add(self, H: Tensor, target: Tensor, mu: Tensor, g: Gradients, wanted: Both) -> None:
        """Adds the share of one batch to the gradients that are wanted. At least one is."""
        assert self.moments is not None
        with torch.autocast(H.device.type, enabled=False):
            small = small_gradient(H, mu, self.moments, g)
        # copies, since the caller may write into these tensors after the backward
        self.leave(small, [TargetRows(H.clone(), target.clone(), g.c.clone())], wanted)

    def add_to_each_row(self, r: Tensor, wanted: Both) -> None:
        """Adds π_k r, r (n), to the gradient of every row [W b]_k that is wanted."""
        r = r.to(self.dtype)
        self.leave((r.new_zeros(len(r), len(r)), r), [], wanted)

    def leave(self, small: tuple[Tensor, Tensor], targets: list[TargetRows], wanted: Both) -> None:
        """Leaves a share where the gradients wait."""
        pair = zip((self.W, self.b), wanted, strict=True)
        places = [waiting(x).shares for x, want in pair if want and x is not None]
        # an earlier share that waits at the same places, unless a zero_grad has dropped it
        share = next((x for x in places[0] if self.whose(x) == wanted), None)
        if share is not None:
            share.add(small, targets)
            return
        share = Share(self, small, targets)
        for place in places:
            place.append(share)

    def whose(self, share: Share) -> Both:
        """Whether the gradients of W and of b wait for this share."""
        return share in shares_of(self.W, self), share in shares_of(self.b, self)

    def finish(self) -> None:
        """Adds all shares to the gradients of W and b, and runs the hooks on them."""
        self.check()
        if not (shares_of(self.W, self) or shares_of(self.b, self)):
            return
        for was, now in zip(self.samples, self.current_samples(), strict=True):
            if not torch.equal(was, now):
                raise RuntimeError(
                    "the weight, bias or prior has been changed inside accumulate(), so the losses "
                    "since then are wrong and nothing is added; step the optimizer after the "
                    "context"
                )
        shares = withdraw(self.W, self), withdraw(self.b, self)
        given = [x if mine else None for x, mine in zip((self.W, self.b), shares, strict=True)]
        with torch.enable_grad():
            end: Tensor = Delivery.apply(self, shares, *given)  # type: ignore[no-untyped-call]
        end.backward()

    def gradients(
        self, shares: tuple[list[Share], list[Share]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to W and b that the shares add up to; None without shares."""
        of_W, of_b = shares
        if of_W == of_b:
            return self.gradients_of(of_W, (bool(of_W), bool(of_b)))
        return self.gradients_of(of_W, (True, False))[0], self.gradients_of(of_b, (False, True))[1]

    def gradients_of(
        self, shares: list[Share], wanted: Both
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to W and b, of those that are wanted, of the same shares."""
        if not shares:
            return None, None
        assert self.moments is not None
        A, v = (torch.stack(x).sum(0) for x in zip(*(share.small for share in shares), strict=True))
        targets = joined([rows for share in shares for rows in share.targets])
        inputs = self.inputs(self.W[:0], torch.empty(0, 1, dtype=torch.long, device=self.W.device))
        with torch.autocast(self.W.device.type, enabled=False):
            return weight_gradients(
                inputs,
                self.moments,
                (A, v),
                targets,
                wanted,
                self.chunk_size(inputs),
                deterministic=self.options.deterministic,
            )

    def close(self) -> None:
        """Forgets all shares; the backward of a graph that is left raises an error."""
        for x in (self.W, self.b):
            withdraw(x, self)
        self.open, self.moments, self.total = False, None, None
