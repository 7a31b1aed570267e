"""The engines of a linear output layer by name."""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from softsphere._torch import transforms_active
from softsphere.engines import choice, chunked, dense, gram
from softsphere.engines.options import LinearSphericalOptions
from softsphere.stats import Stats

__all__ = ["ENGINES", "Engine", "statistics"]


class Engine(Protocol):
    """(s, q, c) of H Wᵀ + b, with gradients by H, W and b."""

    def __call__(
        self,
        H: Tensor,
        W: Tensor,
        b: Tensor | None,
        target: Tensor,
        pi: Tensor | None,
        *,
        centred: bool,
        options: LinearSphericalOptions,
    ) -> Stats: ...


ENGINES: dict[str, Engine] = {
    "dense": dense.statistics,
    "chunked": chunked.statistics,
    "gram": gram.statistics,
}


def statistics(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    *,
    centred: bool,
    options: LinearSphericalOptions,
) -> Stats:
    """Statistics of H (m, d), W (D, d), b (D) for targets (m, K) by the engine of the options."""
    name = options.engine
    eager = not torch.compiler.is_compiling()
    forward_mode = eager and forward_ad._current_level >= 0
    transforms = eager and transforms_active()
    if name == "auto":
        (m, K), (D, d) = target.shape, W.shape
        # the kernels sum in what the inputs are summed in, and nothing wider
        triton = choice.TRITON and options.accumulate_dtype == torch.float32 and H.dtype == W.dtype
        name = choice.cheapest(m, D, d, H.dtype, H.device.type, K, b is not None, triton)
        if forward_mode or transforms:
            # the operators of the others have no rule for them
            name = "dense"
    elif name != "dense" and (forward_mode or transforms):
        what = "forward-mode derivative" if forward_mode else "rule for torch.func transforms"
        raise RuntimeError(f"engine={name!r} has no {what}; use engine='dense' (or 'auto')")
    engine = ENGINES.get(name) or kernels(H.device)
    return engine(H, W, b, target, pi, centred=centred, options=options)


def kernels(device: torch.device) -> Engine:
    """The triton engine, imported when it is first wanted.

    Raises: ImportError where triton is not installed, ValueError for a device it has no code for.
    """
    if not choice.TRITON:
        raise ImportError(
            "engine='triton' needs the triton package, which is not installed; "
            "install it, or use engine='auto', 'gram' or 'chunked'"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"engine='triton' needs tensors on a CUDA device, got {device}; use engine='auto', "
            "'gram' or 'chunked', or set TRITON_INTERPRET=1 to debug its kernels"
        )
    from softsphere.engines import triton

    return triton.statistics
