"""An assignment of classes to clusters: what is known of it, and the file that holds it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from softsphere import checks
from softsphere.clusters.placement import on_cpu
from softsphere.packed_states import DamagedError, packed, unpacked
from softsphere.whole_files import write_bytes

__all__ = ["Clusters", "directions", "from_tail"]

_KIND = "softsphere.clusters "
_FORMAT = f"{_KIND}1"


@dataclass(frozen=True, eq=False, repr=False)
class Clusters:
    """Which classes are in the shortlist, and in which cluster each of the others is.

    Args:
        assignment: (D) integers; the cluster 0 … C − 1 of each class, or −1 for the shortlist.
        counts: (D), how often each class occurs, or frequencies. A class that was never seen counts
            like the rarest one that was, so that all counts are positive, as in a base measure.
        vectors: (D, n) or None, the vectors that the clusters were made from.

    The tensors are kept on the CPU: assignment in int64, counts in float64, vectors in float32.

    Raises TypeError or ValueError if the shapes do not agree, for clusters below −1, counts that
    are negative, not finite or all zero, and for vectors that are not finite.

    >>> clusters = Clusters(torch.tensor([0, 1, -1, 1]), torch.tensor([3, 1, 10, 2]))
    >>> clusters
    Clusters(num_classes=4, shortlist=1, num_clusters=2, tail_share=0.375, largest_share=0.5)
    >>> clusters.classes(1)
    tensor([3, 1])
    """

    assignment: Tensor
    counts: Tensor
    vectors: Tensor | None = None

    def __post_init__(self) -> None:
        assignment, counts = checks.assignment(self.assignment), checks.class_counts(self.counts)
        if len(counts) != len(assignment):
            raise ValueError(
                "counts must have one entry for each of the "
                f"{len(assignment)} entries of assignment, got {len(counts)}"
            )
        # A frozen dataclass sets its own attributes in this way.
        object.__setattr__(self, "assignment", assignment)
        object.__setattr__(self, "counts", counts)
        if self.vectors is not None:
            vectors = checks.class_vectors(self.vectors, len(assignment))
            object.__setattr__(self, "vectors", vectors)

    @property
    def num_classes(self) -> int:
        """D, the number of classes."""
        return len(self.assignment)

    @property
    def num_clusters(self) -> int:
        """C, the number of clusters."""
        return int(self.assignment.max()) + 1

    @property
    def shortlist(self) -> int:
        """S, the number of classes that are in no cluster."""
        return int((self.assignment < 0).sum())

    @property
    def sizes(self) -> Tensor:
        """(C) int64, the number of classes of each cluster."""
        return torch.bincount(self._of_tail, minlength=self.num_clusters)

    @property
    def tail_share(self) -> float:
        """The share of the classes outside the shortlist in all counts."""
        return float(self.counts[self.assignment >= 0].sum() / self.counts.sum())

    @property
    def shares(self) -> Tensor:
        """(C) float64, the share of each cluster in the counts of all clusters; the sum is 1."""
        counts = self.counts[self.assignment >= 0]
        mass = torch.bincount(self._of_tail, weights=counts, minlength=self.num_clusters)
        return mass / mass.sum()

    @property
    def outputs(self) -> float:
        """The mean number of outputs that are computed for a row, S + C + tail share · Σ share n.

        With hidden states of width d a row costs d multiply-adds for each of them.
        """
        leaf = float((self.shares * self.sizes).sum()) if self.num_clusters else 0.0
        return self.shortlist + self.num_clusters + self.tail_share * leaf

    @property
    def _of_tail(self) -> Tensor:
        return self.assignment[self.assignment >= 0]

    def classes(self, cluster: int) -> Tensor:
        """Returns the classes of a cluster, or of the shortlist, commonest first, int64.

        Args:
            cluster: 0 … C − 1, or −1 for the shortlist.

        Raises TypeError or ValueError unless cluster is from −1 to C − 1.
        """
        number = checks.integer("cluster", cluster)
        if not -1 <= number < self.num_clusters:
            among = f"from 0 to {self.num_clusters - 1}, or " if self.num_clusters else ""
            raise ValueError(f"cluster must be {among}−1 for the shortlist, got {number}")
        found = (self.assignment == number).nonzero().flatten()
        return found[self.counts[found].argsort(descending=True, stable=True)]

    @on_cpu
    def rows(self, width: int, std: float = 0.1, *, seed: int = 0) -> Tensor:
        """Returns initial rows of embeddings, or of an output weight, made from the vectors.

        The directions of the vectors, v / ‖v‖, are centred and scaled to a standard deviation.
        Columns beyond `width` are left out; missing ones are drawn from a normal distribution. Rows
        of classes without a vector are drawn as well, and all rows where all vectors have one
        direction.

        Args:
            width: the number of columns.
            std: the standard deviation of the entries.
            seed: of the entries that are drawn.

        Returns a float32 tensor (D, width), in the order of the classes.

        Raises ValueError for clusters without vectors, a width below 1, and a std that is not
        positive.

        >>> clusters = Clusters(torch.tensor([0, 0, 1]), torch.ones(3), torch.randn(3, 2))
        >>> embedding = torch.nn.Embedding.from_pretrained(clusters.rows(8), freeze=False)
        """
        if self.vectors is None:
            raise ValueError(
                "rows are made from vectors, and these clusters have none; make them with "
                "by_neighbours or by_vectors, or load a file that was saved with vectors"
            )
        width = checks.at_least_one("width", width)
        checks.positive("std", std)
        chance = torch.Generator().manual_seed(checks.seed(seed))
        size = (self.num_classes, width)
        drawn = torch.randn(size, generator=chance, dtype=torch.float32).mul_(std)
        known = self.vectors.any(1)
        if not bool(known.any()):
            return drawn
        own = directions(self.vectors[known])[:, :width]
        own = own - own.mean(0)
        spread = own.std(correction=0)
        # Entries of unit vectors are about 1/√w; those of one direction differ by rounding alone.
        rounding = 8 * torch.finfo(own.dtype).eps / self.vectors.shape[1] ** 0.5
        if float(spread) > rounding:
            drawn[known, : own.shape[1]] = own * (std / spread)
        return drawn

    def save(self, path: str | os.PathLike[str], *, vectors: bool = True) -> None:
        """Writes a file that `Clusters.load` reads.

        The file is written in one step: after an interrupt the old file is there, or the new one.

        Args:
            path: the file.
            vectors: whether the file has the vectors, which are most of its size.

        Raises OSError if the file cannot be written.
        """
        checks.flag("vectors", vectors)
        state = {
            "format": _FORMAT,
            "assignment": self.assignment.int(),
            "counts": self.counts,
            "vectors": self.vectors if vectors else None,
        }
        write_bytes(Path(path), packed(state))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Clusters:
        """Returns the clusters of a file that `save` wrote. No code in the file is run.

        Args:
            path: the file.

        Raises ValueError for a file that is not one of these, and OSError if it cannot be read.
        """
        content = Path(path).read_bytes()
        try:
            state = unpacked(content)
        except DamagedError as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged: {error}; make the clusters again, or take a copy "
                "of the file"
            ) from error
        except Exception as error:  # torch.load has many, and the file itself was read
            raise _not_ours(path) from error
        known = {"format", "assignment", "counts", "vectors"}
        written = str(state.get("format")) if isinstance(state, dict) else ""
        if written.startswith(_KIND) and written != _FORMAT:
            raise ValueError(
                f"{os.fspath(path)} was written by another version of softsphere, in the format "
                f"{written!r}, and this one reads {_FORMAT!r}; load it with that version"
            )
        if written != _FORMAT or known - state.keys():
            raise _not_ours(path)
        try:
            return cls(state["assignment"], state["counts"], state["vectors"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error

    def __repr__(self) -> str:
        parts = {"num_classes": self.num_classes, "shortlist": self.shortlist}
        parts |= {"num_clusters": self.num_clusters}
        words = [f"{name}={value}" for name, value in parts.items()]
        if self.num_clusters:
            words.append(f"tail_share={self.tail_share:.3g}")
            words.append(f"largest_share={float(self.shares.max()):.3g}")
        if self.vectors is not None:
            words.append(f"vectors={tuple(self.vectors.shape)}")
        return f"Clusters({', '.join(words)})"


def directions(vectors: Tensor) -> Tensor:
    """Returns v / ‖v‖ for each row, and zeros for a row of zeros."""
    # The squares of rows divided by their largest entry neither overflow nor vanish.
    largest = vectors.abs().amax(1, keepdim=True)
    return F.normalize(torch.where(largest > 0, vectors / largest, 0.0), dim=1)


def from_tail(
    counts: Tensor, tail: Tensor, cluster: Tensor, vectors: Tensor | None = None
) -> Clusters:
    """Returns clusters from the classes outside the shortlist and the cluster of each of them."""
    assignment = torch.full((len(counts),), -1)
    assignment[tail] = cluster
    return Clusters(assignment, counts, vectors)


def _not_ours(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"{os.fspath(path)} is not a file of clusters; pass one that Clusters.save wrote"
    )
