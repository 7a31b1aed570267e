"""The arrays that are kept of a factored matrix W = V U + 1 ωᵀ, and how W is read from them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softsphere.matrix.generations import Generations
from softsphere.matrix.precision import (
    Rounded,
    float32_is_exact,
    in_full_precision,
    is_asynchronous,
    product,
)
from softsphere.matrix.rows import Rows
from softsphere.matrix.small_arrays import SmallArrays
from softsphere.rounding import MOST_TERMS

__all__ = ["Arrays"]

# The number of rows from which the mean row is estimated before W is read.
_SAMPLE = 256


class Arrays(SmallArrays):
    """V, U, U⁻¹, ω, G, w̄ and M of a D × w matrix W = V U + 1 ωᵀ.

    V is (D, w) and large. U, U⁻¹, G (w, w), ω and w̄ (w) are small and always float64. With the base
    measure Π = diag(π), the identity if none is given, M = Σ π, w̄ = Wᵀπ, r = w̄/M is the mean row,
    and G = (W − 1rᵀ)ᵀ Π (W − 1rᵀ), so that a large common row costs G no digits. G and w̄ are
    computed from V when they are first needed. `SmallArrays` has them all but V.

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
        self.begin()
        self.generations.forget(self.V.width)
        self.is_written = True
        self.renamed()
        self.forget_gram()

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

    @in_full_precision
    def rows(self, index: Tensor | slice, columns: slice = slice(None)) -> Tensor:
        """W[index]: (n, w)."""
        return self.outputs(self.coordinates(index), columns)

    @in_full_precision
    def centred_rows(self, index: Tensor, *, rounded: bool = True) -> Tensor:
        """W at targets (n), of the first block, less the mean row: (n, d).

        rounded: whether it is in the dtype of V rather than in float64.
        """
        dtype = self.dtype if rounded else torch.float64
        return self.centred_outputs(self.target_coordinates(index), self.block(0), dtype)

    @in_full_precision
    def centred_outputs(self, coordinates: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
        """Computes rows of W less the mean row from their current coordinates (n, w), in dtype."""
        if dtype == torch.float64 or not float32_is_exact():
            return (self.outputs(coordinates, columns) - self.mean[columns]).to(dtype)
        shift = (self.omega - self.mean)[columns]
        near = shift.to(dtype)
        rows = torch.addmm(near, coordinates, self.small("U")[:, columns])
        if is_asynchronous(self.device):
            return rows  # rounding the shift once is worth fewer digits than three launches
        # what rounding takes off the shift of the rows
        return rows.add_((shift - near).to(dtype))

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
        self.copy_small_to(other, device, sums=dtype == self.dtype and device.type != "meta")
        other.edition, other.is_written = self.edition, self.is_written
        return other

    def state(self) -> dict[str, Tensor]:
        """Returns every array, for comparison."""
        V = torch.cat(self.V.blocks, 1)
        return {"V": V, **self.small_state()}
