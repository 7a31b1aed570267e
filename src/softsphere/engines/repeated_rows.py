"""Rows of a weight that a batch reads more than once.

In half precision PyTorch adds the gradients of a row one after another in its own dtype. The sum
of a common class stands still as soon as it is a few hundred times as large as what is added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere._torch import is_recorded
from softsphere.equal_indices import places_of_equals

__all__ = ["repeated_rows"]


def repeated_rows(x: Tensor, index: Tensor, dtype: torch.dtype, *, sparse: bool = False) -> Tensor:
    """x[index] (n, d) or (n) in a dtype that is as wide as that of x, or wider.

    The gradients of equal rows are summed in that dtype, and rounded once to that of x.

    Args:
        x: (D, d) or (D).
        index: (n), of which some may be equal.
        dtype: the dtype of the computation.
        sparse: whether the gradient with respect to x is sparse.
    """
    if x.dtype == dtype or not is_recorded(x):
        return _read(x, index, sparse).to(dtype)
    ordered, place = places_of_equals(index)
    return _read(x, ordered, sparse).to(dtype).index_select(0, place)


def _read(x: Tensor, index: Tensor, sparse: bool) -> Tensor:
    if x.dim() == 2:
        return F.embedding(index, x, sparse=sparse)
    # an embedding has no vectors
    return x.gather(0, index, sparse_grad=sparse)
