"""Vectors of classes from what occurs next to them.

The table of counts has a row for each class and a column for each of the commonest contexts: in a
stream of tokens one for what comes before and one for what comes after. Its entries become

    max(0, log(n_kj n / (n_k n_j))),

the positive pointwise mutual information, where n_k and n_j are the sums of the row and the column,
plus one each, so that a few joint occurrences of rare things count less. The vectors are the
projections on the first principal directions, where each class weighs the square root of its count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from softsphere.clusters.extra import needed, one_thread

__all__ = ["neighbour_vectors"]

# So many tokens are counted at once.
PART = 2**22


def neighbour_vectors(
    tokens: Tensor, counts: Tensor, contexts: int, dimensions: int, seed: int
) -> Tensor:
    """Returns (D, dimensions) float32, or fewer columns if the table has no more.

    tokens: (N) class indices, or (N, 2) pairs of a class and a context.
    """
    table = _positive_information(_table(tokens, counts, contexts))
    if not table.nnz:
        return torch.zeros(len(counts), 1, dtype=torch.float32)
    weight = needed("scipy.sparse").diags(counts.pow(0.25).float().numpy())
    # Where the table has a lower rank, scikit-learn's "arpack" draws numbers that no seed controls.
    reduction = needed("sklearn.decomposition").TruncatedSVD(
        min(dimensions, *table.shape), random_state=seed
    )
    with one_thread():
        reduction.fit(weight @ table)
        return torch.from_numpy(reduction.transform(table)).float()


def _table(tokens: Tensor, counts: Tensor, contexts: int) -> Any:
    """How often each class occurs with each context: a sparse matrix (D, columns) in float32."""
    sparse = needed("scipy.sparse")
    parts, columns = _occurrences(tokens, counts, contexts)
    shape = (len(counts), columns)
    table = sparse.csr_matrix(shape, dtype="float32")
    for rows, places in parts:
        ones = torch.ones(len(rows), dtype=torch.float32).numpy()
        table = table + sparse.coo_matrix((ones, (rows.numpy(), places.numpy())), shape).tocsr()
    return table


def _occurrences(
    tokens: Tensor, counts: Tensor, contexts: int
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """Classes and the columns that they occur in, part by part, and the number of columns."""
    if tokens.dim() == 2:
        return _of_pairs(tokens, contexts)
    chosen = counts.argsort(descending=True, stable=True)[:contexts]
    column = torch.full((len(counts),), -1, dtype=torch.int32)
    column[chosen] = torch.arange(len(chosen), dtype=torch.int32)
    return _of_stream(tokens, column, len(chosen)), 2 * len(chosen)


def _of_stream(tokens: Tensor, column: Tensor, before: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(tokens) - 1, PART):
        part = tokens[start : start + PART + 1]
        for own, other, shift in ((part[1:], part[:-1], 0), (part[:-1], part[1:], before)):
            place = column[other]
            counted = place >= 0
            yield own[counted].int(), place[counted] + shift


def _of_pairs(pairs: Tensor, contexts: int) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    known, place, often = pairs[:, 1].unique(return_inverse=True, return_counts=True)
    chosen = often.argsort(descending=True, stable=True)[:contexts]
    column = torch.full((len(known),), -1, dtype=torch.int32)
    column[chosen] = torch.arange(len(chosen), dtype=torch.int32)
    parts = zip(pairs[:, 0].split(PART), column[place].split(PART), strict=True)
    found = ((own[at >= 0].int(), at[at >= 0]) for own, at in parts)
    return found, len(chosen)


def _positive_information(table: Any) -> Any:
    """The table with its counts replaced by their positive pointwise mutual information."""
    columns = torch.from_numpy(table.indices).long()
    rows = torch.arange(table.shape[0]).repeat_interleave(torch.from_numpy(table.indptr).diff())
    joint = torch.from_numpy(table.data).double()
    of_row = torch.bincount(rows, joint, table.shape[0]) + 1
    of_column = torch.bincount(columns, joint, table.shape[1]) + 1
    ratio = joint * joint.sum() / (of_row[rows] * of_column[columns])
    table.data = ratio.clamp_min(1).log().float().numpy()
    table.eliminate_zeros()
    return table
