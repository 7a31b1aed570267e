"""The arrays that are kept of a factored matrix W = V U + 1 ωᵀ, and how W is read from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from softsphere._torch import add_each
from softsphere.matrix.abstract import Kept
from softsphere.matrix.generations import Generations
from softsphere.matrix.precision import (
    Rounded,
    float32_is_exact,
    in_full_precision,
    is_asynchronous,
    product,
)
from softsphere.matrix.rows import Rows
from softsphere.matrix.small_matrix import SmallMatrix
from softsphere.rounding import MOST_TERMS

__all__ = ["Arrays"]

_SMALL = ("U", "U_inv", "omega", "centred_gram", "colsum")
_MATRICES = ("U", "U_inv", "centred_gram")
# The number of rows from which the mean row is estimated before W is read.
_SAMPLE = 256


class Arrays(Kept):
    """V, U, U⁻¹, ω, G, w̄ and M of a D × w matrix W = V U + 1 ωᵀ.

    V is (D, w) and large. U, U⁻¹, G (w, w), ω and w̄ (w) are small and always float64; what steps
    add to the first three may be summed apart for a while, see `SmallMatrix`. With the base
    measure Π = diag(π), the identity if none is given, M = Σ π, w̄ = Wᵀπ, r = w̄/M is the mean row,
    and G = (W − 1rᵀ)ᵀ Π (W − 1rᵀ), so that a large common row costs G no digits. G and w̄ are
    computed from V when they are first needed.

    Args:
        V: the rows, which are not copied.
        pi: (D) positive with Σ π = D, or None for one everywhere.
        width: the number of columns of one block of W; None for all of V.

    `ShardedArrays` has some of the rows of W. Targets are then classes among all, while V, π and
    what is read by `rows` and `chunks` are those of this rank.
    """

    def __init__(self, V: Rows, pi: Tensor | None = None, width: int | None = None) -> None:
        self.V, self.pi = V, pi
        self.width = V.width if width is None else width
        self.rounded = Rounded()
        self.generations = Generations(V.num_rows, V.width, V.device, self.rounded)
        self.is_written = False
        self.reset_()

    @property
    def mass(self) -> float:
        """M = Σ π = D, since a prior is normalised."""
        return float(self.all_rows)

    def like(self, V: Rows, pi: Tensor | None) -> Arrays:
        """Returns arrays of this kind for other rows."""
        return Arrays(V, pi, self.width)

    def target_coordinates(self, targets: Tensor) -> Tensor:
        """The current coordinates (n, w) of the rows of W at some targets (n)."""
        return self.coordinates(targets)

    def target_pi(self, targets: Tensor) -> Tensor | None:
        """π at targets (n), or None for one everywhere."""
        return None if self.pi is None else self.pi[targets]

    def own_targets(self, targets: Tensor) -> tuple[Tensor, Tensor | slice]:
        """The rows of V of targets (n), and which of the targets those are."""
        return targets, slice(None)

    def total(self, x: Tensor) -> Tensor:
        """A sum over rows of V, as a sum over all rows of W."""
        return x

    def reset_(self) -> None:
        """Takes V for W: U = I and ω = 0. G and w̄ are computed when they are next needed."""
        eye = torch.eye(self.V.width, dtype=torch.float64, device=self.device)
        self.matrices = {"U": SmallMatrix(eye), "U_inv": SmallMatrix(eye.clone())}
        self.omega = torch.zeros_like(eye[0])
        self.generations.forget(self.V.width)
        self.is_written = True
        self.renamed()
        self.forget_gram()

    def forget_gram(self) -> None:
        """Has G and w̄ computed again when they are next needed."""
        self.matrices.pop("centred_gram", None)
        self.changed()

    def changed(self) -> None:
        """Notes that the small arrays have changed, so that they are rounded again."""
        self.rounded.forget(*_SMALL, "mean")

    @property
    def U(self) -> Tensor:
        """U (w, w); it may be a new tensor, so write it by `put`."""
        return self.matrix("U").value

    @property
    def U_inv(self) -> Tensor:
        """U⁻¹ (w, w), as U."""
        return self.matrix("U_inv").value

    @property
    def gram(self) -> Tensor:
        """Q = Wᵀ Π W = G + M r rᵀ (w, w), as a new tensor."""
        return torch.addr(self.centred_gram, self.colsum, self.mean)

    @property
    def centred_gram(self) -> Tensor:
        """G (w, w), the Gram matrix under π of the rows less their mean row, as U."""
        return self.matrix("centred_gram").value

    @property
    def colsum(self) -> Tensor:
        """w̄ = Wᵀ π (w)."""
        self.know_sums()
        return self._colsum

    @property
    def mean(self) -> Tensor:
        """r = w̄ / M (w), the mean row under π, as a new tensor."""
        return self.colsum / self.mass

    @property
    def sums_known(self) -> bool:
        """Whether G and w̄ are known."""
        return "centred_gram" in self.matrices

    def know_sums(self) -> None:
        """Computes G and w̄ unless they are known: O(D w²). They are kept through steps."""
        if not self.sums_known:
            self.set_sums(*self.computed_sums())

    def set_sums(self, gram: Tensor, colsum: Tensor) -> None:
        """Takes these for G and w̄."""
        self._colsum = colsum
        self.matrices["centred_gram"] = SmallMatrix(gram)

    @in_full_precision
    def computed_sums(self) -> tuple[Tensor, Tensor]:
        """Computes G and w̄ from the rows of W.

        A large common row would cost G its digits. An estimate of the mean row is therefore taken
        off before the rows are multiplied, and the rest of the mean row afterwards.
        """
        rest = torch.zeros_like(self.omega)
        gram = rest.new_zeros(len(rest), len(rest))
        near_mean = self.near_mean()
        for part, rows in self.chunks(min(self.V.chunk_size(), MOST_TERMS)):
            shifted = self.split(rows - near_mean)
            pi = None if self.pi is None else self.pi[part].unsqueeze(1)
            weighted = shifted if pi is None else [x * pi for x in shifted]
            gram += torch.cat([torch.cat([product(x.mT, y) for y in shifted], 1) for x in weighted])
            rest += torch.cat([x.sum(0, dtype=torch.float64) for x in weighted])
        gram, rest = self.total(gram), self.total(rest)
        # addr may round the last columns differently from the first.
        gram = (gram + gram.mT) / 2 - torch.outer(rest, rest / self.mass)
        return gram, rest + self.mass * near_mean

    def near_mean(self) -> Tensor:
        """About the mean row (w), from some rows of W."""
        step = max(1, self.num_rows // _SAMPLE)
        sample = self.rows(torch.arange(0, self.num_rows, step, device=self.device))
        # Written like this, it is exact where all rows are equal.
        return sample[0] + torch.cat([x.mean(0) for x in self.split(sample - sample[0])])

    def split(self, rows: Tensor) -> list[Tensor]:
        """Returns the blocks of rows (n, w).

        Sums of one block then have the same digits whether or not another stands beside it.
        """
        return [x.contiguous() for x in rows.split(self.width, 1)]

    def squares(self) -> Tensor:
        return self.gram.diagonal()

    def sums_are_finite(self) -> bool:
        return bool((self.centred_gram.diagonal() + self.colsum).isfinite().all())

    def small(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a small array in float64 or in the dtype of V, valid until the next step."""
        if dtype == torch.float64:
            exact: Tensor = getattr(self, name)
            return exact
        return self.rounded.get(name, self.dtype, lambda: self._parts(name))

    def _parts(self, name: str) -> tuple[Tensor, ...]:
        """A small array in float64, or two in the dtype of V whose sum it is."""
        if name not in _MATRICES:
            return (getattr(self, name),)
        return self.matrix(name).rounded_parts(self.dtype)

    def matrix(self, name: str) -> SmallMatrix:
        """U, U⁻¹ or G, as it is kept."""
        if name == "centred_gram":
            self.know_sums()
        return self.matrices[name]

    def diagonal(self, name: str) -> Tensor:
        """The diagonal of U, U⁻¹ or G (w)."""
        return self.matrix(name).diagonal

    def put(self, name: str, value: Tensor) -> None:
        """Sets a small array, in the memory that it has."""
        if name in _MATRICES:
            self.matrix(name).put(value)
        else:
            getattr(self, name).copy_(value)

    def scale(self, name: str, factor: float | Tensor) -> None:
        """Multiplies a small array by a number."""
        if name in _MATRICES:
            self.matrix(name).settle()
        getattr(self, name).mul_(factor)

    def add(self, increments: dict[str, Tensor], share: float, *, apart: bool) -> None:
        """Adds to the small arrays what a step of this smallest pivot adds.

        apart: whether increments in float32 are summed apart, see `SmallMatrix`. It does not pay
            where the arrays are multiplied in every step.
        """
        now = {}
        for name, x in increments.items():
            if name in _MATRICES and apart and x.dtype != torch.float64:
                self.matrix(name).add(x, share)
            else:
                now[name] = x
        self.settle(now)
        add_each([getattr(self, name) for name in now], list(now.values()))

    def widen(self, basis: Tensor) -> None:
        """U ← basis ⊗ U for basis (2, 2), with 0 as ω of the new columns."""
        back = torch.linalg.inv(basis).contiguous()
        for name, map_of_blocks in (("U", basis), ("U_inv", back)):
            old = self.matrices[name].value.contiguous()
            self.matrices[name] = SmallMatrix(torch.kron(map_of_blocks, old))
        self.omega = torch.nn.functional.pad(self.omega, (0, self.width))

    def settle(self, names: Iterable[str] = _MATRICES) -> None:
        """Adds what was summed apart."""
        for name in names:
            if name in self.matrices:
                self.matrices[name].settle()

    @in_full_precision
    def rows(self, index: Tensor | slice, columns: slice = slice(None)) -> Tensor:
        """W[index]: (n, w)."""
        return self.outputs(self.coordinates(index), columns)

    @in_full_precision
    def centred_rows(self, index: Tensor, *, rounded: bool = True) -> Tensor:
        """W at targets (n), of the first block, less the mean row: (n, d).

        rounded: whether it is in the dtype of V rather than in float64.
        """
        rows = self.outputs(self.target_coordinates(index), self.block(0))
        mean = self.mean[: self.width]
        if not rounded or rows.dtype == mean.dtype or is_asynchronous(self.device):
            return (rows - mean).to(rows.dtype if rounded else mean.dtype)
        # On a CPU this takes less time, and is as good: what rounding takes off the mean row is
        # subtracted too.
        near = self.small("mean")[: self.width]
        return (rows - near).sub_(mean - near)

    @in_full_precision
    def outputs(self, coordinates: Tensor, columns: slice = slice(None)) -> Tensor:
        """Computes rows of W from their current coordinates (n, w)."""
        omega, U = self.small("omega")[columns], self.small("U")[:, columns]
        if float32_is_exact() or U.dtype == torch.float64:
            return torch.addmm(omega, coordinates, U)
        return product(coordinates, self.U[:, columns]) + omega

    @in_full_precision
    def coordinates(self, index: Tensor | slice) -> Tensor:
        """Returns V[index] in the current coordinates, from which U and ω make W[index]."""
        if self.generations.alone:
            return self.V[index]
        return self.generations.carried(self.V[index], self.generations.made[index])

    @in_full_precision
    def times(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of rows, W x there) for x (w, p), in float64. O(D w p) a generation."""
        each = self.generations.maps @ (self.U @ x)
        flat, shift = each.transpose(0, 1).flatten(1), self.omega @ x
        for part in self.V.chunks():
            made = self.generations.made[part].long()
            by_each = self.V.times(part, flat).view(len(made), len(each), -1)
            yield part, shift + by_each[torch.arange(len(made), device=made.device), made]

    def copied(self, device: torch.device, dtype: torch.dtype) -> Arrays:
        """Copies a matrix of one block, factor by factor, to a device and a dtype."""
        pi = self.pi
        if pi is not None:
            pi = pi.to(device if device.type != "meta" else pi.device, dtype, copy=True)
            if dtype == torch.float64 and self.dtype == torch.float32:
                # Otherwise Σ π = D would hold only to float32.
                pi *= self.mass / self.total(pi.sum())
        other = self.like(Rows(*self.V.to(device, dtype)), pi)
        other.generations = self.generations.copied(device, other.rounded)
        for name, matrix in self.matrices.items():
            if name != "centred_gram" or (dtype == self.dtype and device.type != "meta"):
                other.matrices[name] = matrix.copied(device)
        other.omega = self.omega.to(device, copy=True)
        if other.sums_known:
            other._colsum = self._colsum.to(device, copy=True)
        other.edition, other.is_written = self.edition, self.is_written
        return other

    def state(self) -> dict[str, Tensor]:
        """Returns every array, for comparison."""
        V = torch.cat(self.V.blocks, 1)
        return {"V": V, **{name: getattr(self, name) for name in _SMALL}}
