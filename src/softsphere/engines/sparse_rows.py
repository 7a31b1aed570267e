"""Some rows of a weight, with a gradient that is a sparse tensor of these rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["refuse_second_derivatives", "sparse_rows"]


def sparse_rows(W: Tensor, index: Tensor) -> Tensor:
    """W[index] (n, d), for different indices (n) in ascending order; differentiable once."""
    rows: Tensor = _SparseRows.apply(W, index)  # type: ignore[no-untyped-call]
    return rows


def refuse_second_derivatives() -> None:
    raise RuntimeError(
        "second derivatives (create_graph=True) cannot be taken where the gradient of weight "
        "is sparse; make the layer with sparse=False"
    )


class _SparseRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = W.shape
        return W.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # F.embedding(…, sparse=True) has a gradient that is taken for a constant without a word
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        (index,) = ctx.saved_tensors
        sparse = torch.sparse_coo_tensor(
            index.unsqueeze(0), g, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None
