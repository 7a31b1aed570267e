"""W = V U + 1 ωᵀ, so that a step that changes every row of W touches a few rows of V."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softsphere.matrix import mending, precision
from softsphere.matrix.generations import Generations
from softsphere.matrix.precision import float32_is_exact, product, usable_now
from softsphere.matrix.structured import StructuredGradient
from softsphere.matrix.update import Blocks, SingularStepError, gram_times, plan

__all__ = ["FactoredMatrix", "Health", "SingularStepError"]

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Health:
    """How well the factors stand.

    condition: rms over i of ‖U_i·‖ ‖U⁻¹_·i‖, by which a rounding error in V is amplified in W
    inverse_drift: ‖U U⁻¹ − I‖ / √w, U's rows scaled to norm 1
    gram_drift: largest relative error of xᵀ Q x against ‖W x‖² over random x; nan if not asked for
    shift: ‖1 ωᵀ‖ / ‖W‖
    generations: in how many of them V has rows
    renewed, refactorised, reinverted, regrammed: how often a generation was begun, V written anew,
        U⁻¹ and Q computed anew
    seconds: spent on all of that
    """

    condition: float
    inverse_drift: float
    gram_drift: float
    shift: float
    generations: int
    renewed: int
    refactorised: int
    reinverted: int
    regrammed: int
    seconds: float


class FactoredMatrix(nn.Module):
    """A D × w matrix W = V U + 1 ωᵀ with U⁻¹, Q = Wᵀ Π W, w̄ = Wᵀ π and M = Σ π kept beside it.

    V is (D, w) and large; U, U⁻¹, Q (w, w), ω and w̄ (w) are small and always float64. Π = diag(π)
    is the base measure, the identity where none is given. W may be several blocks of d columns
    side by side (an optimizer's momentum beside the weight); gradients are by the first.

    Args:
        weight: (D, w) float32 or float64. It is kept, not copied, and changed in place.
        pi: (D) positive, or None.

    A step costs O(r w² + r² w) for a gradient of r factors, nothing in D.
    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; 2016, arXiv:1606.08061.

    >>> W = FactoredMatrix(torch.ones(5, 2))
    >>> W.gram
    tensor([[5., 5.],
            [5., 5.]], dtype=torch.float64)
    """

    V: Tensor
    U: Tensor
    U_inv: Tensor
    omega: Tensor
    gram: Tensor
    colsum: Tensor
    pi: Tensor | None

    SMALL = ("U", "U_inv", "omega", "gram", "colsum")

    def __init__(self, weight: Tensor, pi: Tensor | None = None) -> None:
        super().__init__()
        if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                "weight must be a (D, d) tensor of float32 or float64, "
                f"got {tuple(weight.shape)} of {weight.dtype}"
            )
        self.width = weight.shape[1]
        self.register_buffer("V", weight.detach(), persistent=False)
        self.register_buffer("pi", pi, persistent=False)
        for name in self.SMALL:
            shape = (0,) if name in ("omega", "colsum") else (0, 0)
            self.register_buffer(
                name,
                torch.empty(shape, dtype=torch.float64, device=weight.device),
                persistent=False,
            )
        self.edition = 0  # counts the changes of W
        self.version = 0  # counts the changes of the factors
        # the small arrays in the dtype of V: kept buffers, and which of them are up to date
        self.shadows: dict[str, Tensor] = {}
        self.fresh: set[str] = set()
        self.generations = Generations(self.num_rows, weight.shape[1], weight.device)
        self.watch = mending.Watch()
        self.canonical_at = -1
        self.reset_()

    @property
    def num_rows(self) -> int:
        """D."""
        return self.V.shape[0]

    @property
    def blocks(self) -> int:
        """How many blocks of `width` columns stand side by side."""
        return self.V.shape[1] // self.width

    @property
    def mass(self) -> float:
        """M = Σ π; a prior is normalised to D."""
        return float(self.num_rows)

    def reset_(self) -> None:
        """Takes V for W: U = I, ω = 0, Q and w̄ from V. O(D w²)."""
        self.edition += 1
        eye = torch.eye(self.V.shape[1], dtype=torch.float64, device=self.V.device)
        self.U, self.U_inv = eye, eye.clone()
        self.omega = torch.zeros_like(eye[0])
        self.generations.forget()
        self.changed()
        self.regram_()
        self.watch.restart()
        self.canonical_at = self.version

    @precision.full
    def regram_(self) -> None:
        """Q and w̄ from the rows of W."""
        gram, colsum = torch.zeros_like(self.U), torch.zeros_like(self.omega)
        for part, rows in self.chunks():
            weighted = rows if self.pi is None else rows * self.pi[part].unsqueeze(1)
            gram += product(weighted.mT, rows)
            colsum += weighted.sum(0, dtype=torch.float64)
        self.gram, self.colsum = (gram + gram.mT) / 2, colsum
        self.changed()

    def changed(self) -> None:
        """What was read before is not W any more."""
        self.version += 1
        self.fresh = set()

    def small(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One of the small arrays in a dtype (that of V); to be read before the next step only."""
        if dtype == torch.float64:
            exact: Tensor = getattr(self, name)
            return exact
        return self.shadow(name, lambda: getattr(self, name))

    def shadow(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives in the dtype of V, in a buffer of that name, made once a step."""
        old = self.shadows.get(name)
        if old is not None and not usable_now(old):
            old = None
        if name not in self.fresh or old is None:
            array = make()
            if array.dtype == self.V.dtype:
                self.shadows[name] = array
            elif old is None or old.shape != array.shape or old.dtype != self.V.dtype:
                self.shadows[name] = array.to(self.V.dtype)
            else:
                old.copy_(array)
            self.fresh.add(name)
        return self.shadows[name]

    def centred_gram(self) -> Tensor:
        """Q − w̄w̄ᵀ/M of the first block, the gram of W less its mean row, in the dtype of V."""
        d = self.width

        def make() -> Tensor:
            mean = self.colsum[:d] / self.mass
            return torch.addr(self.gram[:d, :d], self.colsum[:d], mean, alpha=-1)

        return self.shadow("centred", make)

    def rows(self, index: Tensor, columns: slice = slice(None)) -> Tensor:
        """W[index]: (n, w)."""
        return self.outputs(self.coordinates(index), columns)

    @precision.full
    def outputs(self, coordinates: Tensor, columns: slice = slice(None)) -> Tensor:
        """W's rows from their current coordinates (n, w)."""
        omega, U = self.small("omega")[columns], self.small("U")[:, columns]
        if float32_is_exact() or U.dtype == torch.float64:
            return torch.addmm(omega, coordinates, U)
        return product(coordinates, self.U[:, columns]) + omega

    @precision.full
    def coordinates(self, index: Tensor | slice) -> Tensor:
        """V[index] in the current coordinates: what U and ω make W[index] of."""
        return self.generations.carried(self.V[index], self.generations.made[index])

    def chunks(
        self, size: int | None = None, columns: slice = slice(None)
    ) -> Iterator[tuple[slice, Tensor]]:
        """(slice of rows, W there) over all rows, in pieces of `size` (default: some MiB)."""
        size = size or self.chunk_size()
        for start in range(0, self.num_rows, size):
            part = slice(start, min(start + size, self.num_rows))
            yield part, self.outputs(self.coordinates(part), columns)

    def times(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of rows, W x there) for x (w, p) in V's dtype. O(D w p) for each generation."""
        each = self.generations.maps_in(x.dtype) @ (self.small("U") @ x)
        flat, shift = each.transpose(0, 1).flatten(1), self.small("omega") @ x
        size = self.chunk_size()
        for start in range(0, self.num_rows, size):
            part = slice(start, min(start + size, self.num_rows))
            made = self.generations.made[part].long()
            by_each = (self.V[part] @ flat).view(len(made), len(each), -1)
            yield part, shift + by_each[torch.arange(len(made), device=made.device), made]

    def chunk_size(self) -> int:
        """Rows whose bytes are CHUNK_BYTES, at least one."""
        return max(1, CHUNK_BYTES // (self.V.shape[1] * self.V.element_size()))

    def to_dense(self, chunk: int | None = None, columns: slice = slice(None)) -> Tensor:
        """W, or columns of it, as a new tensor (D, w)."""
        dense = torch.empty_like(self.V[:, columns], memory_format=torch.contiguous_format)
        for part, rows in self.chunks(chunk, columns):
            dense[part] = rows
        return dense

    def add_(self, gradient: StructuredGradient, alpha: float = 1.0, decay: float = 0.0) -> None:
        """W ← (1 − decay) W + alpha G.

        Raises: SingularStepError, with nothing changed, where the step would make U singular or
        holds a value that is not finite.
        """
        self.transform_(gradient, Blocks(((1 - decay,),), (alpha,)))

    @precision.full
    def transform_(self, gradient: StructuredGradient, blocks: Blocks) -> None:
        """[W₁ … W_k] ← [W₁ … W_k] (base ⊗ I) + G (spread ⊗ I), G the gradient by W₁.

        Raises: as `add_`.
        """
        if len(blocks.spread) != self.blocks:
            raise ValueError(f"blocks must be for {self.blocks} blocks, got {len(blocks.spread)}")
        update = plan(self, gradient, blocks)
        if update.refused is None and mending.too_harsh(self, update):
            self.watch.prepare(self, gradient, blocks)
            update = plan(self, gradient, blocks)
        if update.refused is not None:
            raise SingularStepError(update.refused)
        with mending.uninterrupted():
            update.commit(self)
            self.edition += 1
            self.changed()
        self.watch.after_step(self, blocks, update.share)

    @precision.full
    def norm(self, gradient: StructuredGradient) -> Tensor:
        """√tr(Gᵀ Π G), the Frobenius norm of the gradient by diag(√π) W, in O(r² d)."""
        JJH = gram_times(self, gradient)
        return (JJH * gradient.H).sum(dtype=torch.float64).clamp_min(0).sqrt()

    @precision.full
    def gradient_gram(self, gradient: StructuredGradient) -> Tensor:
        """Gᵀ Π G: (d, d)."""
        return gradient.H.mT @ gram_times(self, gradient)

    def to_dense_gradient(self, gradient: StructuredGradient) -> Tensor:
        """G as a new tensor (D, d)."""
        first = slice(0, self.width)
        dense = self.V.new_empty(self.num_rows, self.width)
        for part, rows in self.chunks(columns=first):
            dense[part] = rows @ gradient.A.to(rows.dtype) + gradient.b.to(rows.dtype)
        return dense.index_add_(0, gradient.rows, gradient.X.to(dense.dtype))

    @precision.full
    def widen_(self, blocks: Blocks) -> None:
        """Puts blocks of zeros beside W, in the basis that `blocks` only scales. O(D w)."""
        if self.blocks == len(blocks.base):
            return
        if self.blocks != 1:
            raise ValueError(f"a matrix of {self.blocks} blocks cannot get other ones")
        extra = (len(blocks.base) - 1) * self.width
        basis = torch.tensor(blocks.eigenbasis(), dtype=torch.float64, device=self.V.device)
        pad = nn.functional.pad
        with mending.uninterrupted():
            self.V = pad(self.V, (0, extra))
            self.generations.resize(self.V.shape[1])
            self.U = torch.kron(basis, self.U.contiguous())
            self.U_inv = torch.kron(torch.linalg.inv(basis).contiguous(), self.U_inv.contiguous())
            self.gram = pad(self.gram, (0, extra, 0, extra))
            self.omega, self.colsum = pad(self.omega, (0, extra)), pad(self.colsum, (0, extra))
            self.changed()

    @precision.full
    def narrow_(self) -> None:
        """Leaves the first block alone, without what stands beside it. O(D d²) if there was any."""
        if self.blocks == 1:
            return
        self.canonical_()
        d = self.width
        with mending.uninterrupted():
            self.V = self.V[:, :d].contiguous()
            self.generations.resize(d)
            for name in ("U", "U_inv", "gram"):
                setattr(self, name, getattr(self, name)[:d, :d].contiguous())
            self.omega, self.colsum = self.omega[:d].clone(), self.colsum[:d].clone()
            self.changed()

    @precision.full
    def canonical_(self) -> None:
        """Writes V as W, so that it can be saved as it is. O(D w²).

        What follows is the same whether the factors go on or are saved and loaded.
        """
        if self.canonical_at == self.version:
            return
        self.refactorise_()
        self.watch.restart()
        self.watch.mend_gram(self)
        self.canonical_at = self.version

    def extra_state(self) -> dict[str, Tensor]:
        """What, beside the first block of V, a canonical matrix is made of; nothing is copied."""
        state = {name: getattr(self, name) for name in self.SMALL}
        if self.blocks > 1:
            state["beside"] = self.V[:, self.width :]
        return state

    def state(self) -> dict[str, Tensor]:
        """Every array of the factors."""
        return {"V": self.V, **{name: getattr(self, name) for name in self.SMALL}}

    def misfits(self, state: dict[str, Tensor]) -> list[str]:
        """What in an extra state has another shape than it must have here."""
        w = self.width
        if "beside" in state:
            w += state["beside"].shape[1]
        wanted: dict[str, tuple[int, ...]] = {"beside": (self.num_rows, w - self.width)}
        wanted |= dict.fromkeys(("U", "U_inv", "gram"), (w, w))
        wanted |= dict.fromkeys(("omega", "colsum"), (w,))
        return [
            f"{name} must have shape {shape}, got {tuple(state[name].shape)}"
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != shape
        ]

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `extra_state` gave, the first block of V being written already."""
        self.edition += 1
        if "beside" in state:
            beside = state["beside"]
            self.V = nn.functional.pad(self.V, (0, beside.shape[1]))
            self.V[:, self.width :].copy_(beside)
        self.generations.resize(self.V.shape[1])
        self.generations.forget()
        for name in self.SMALL:
            setattr(self, name, state[name].to(self.gram).clone())
        self.watch.restart()
        self.changed()
        # a weight that has been changed since, or was narrower, has another Q
        self.watch.mend_gram(self)
        self.canonical_at = self.version

    @precision.full
    def refactorise_(self) -> None:
        """V ← W, U ← I, ω ← 0, in row chunks and in place; W is what it was. O(D w²)."""
        mending.rebase(self, torch.eye(self.V.shape[1], dtype=torch.float64, device=self.V.device))

    @precision.full
    def renew_(self) -> None:
        """Begins a new generation; W is what it was. O(w³), nothing in D but a glance at it."""
        mending.renew(self, self.watch.basis(self))

    def condition(self) -> float:
        """See `Health.condition`."""
        return mending.condition(self)

    @precision.full
    def health(self, probes: int = 4) -> Health:
        """Measures the factors; `probes` > 0 also reads W once, O(D w probes), for gram_drift."""
        done = self.watch.done
        return Health(
            condition=self.condition(),
            inverse_drift=mending.inverse_drift(self),
            gram_drift=mending.gram_drift(self, probes),
            shift=mending.shift_share(self),
            generations=sum(count > 0 for count in self.generations.counts()),
            seconds=self.watch.seconds,
            **done,
        )

    @precision.full
    def mend_(self) -> None:
        """Checks now and does what is needed."""
        start = time.perf_counter()
        self.watch.check(self)
        self.watch.seconds += time.perf_counter() - start

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredMatrix:
        # Moves go everywhere; a change of dtype is V's alone, and only between the two it may have.
        def kept(tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> Tensor:
            result = fn(tensor)
            return result if result.dtype in allowed else tensor.to(result.device)

        before = self.V.dtype
        self.V = kept(self.V, (torch.float32, torch.float64))
        if self.pi is not None:
            self.pi = kept(self.pi, (self.V.dtype,)).to(self.V.dtype)
        for name in self.SMALL:
            setattr(self, name, kept(getattr(self, name), (torch.float64,)))
        self.generations._apply(fn)
        self.shadows = {}
        self.changed()
        if before == torch.float32 and self.V.dtype == torch.float64:
            # what was rounded to float32 in Q, w̄ and Σ π = D would stay so for ever
            if self.pi is not None:
                self.pi *= self.mass / self.pi.sum()
            self.regram_()
        return self

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.V.shape[1]}, dtype={self.V.dtype}"
