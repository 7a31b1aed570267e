"""Softmax of a linear layer, as users would compute it instead of a loss of this library.

Some peers are PyTorch's own, others those of kernel libraries. Each says what it needs, so that one
that is not there is left out before a process is started for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere_lab.errors import LabError
from softsphere_lab.timing.chunked_softmax import chunked_softmax

__all__ = ["GPU_SOFTMAX", "SOFTMAX", "LinearLoss", "Peer", "softmax"]

# The loss of hidden rows (m, d), a weight (D, d) and targets (m).
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A softmax that layers of this library are compared with.

    make: makes it, which may need a package or a GPU. package and module: what is installed and
    imported for it, "" for PyTorch. function: what it needs of torch.nn.functional, or "".
    filters: whether it skips what has little probability. sums_as_weight: whether it sums the
    gradient of the weight over chunks of rows in the dtype of the weight.
    """

    make: Callable[[], LinearLoss]
    package: str = ""
    module: str = ""
    function: str = ""
    filters: bool = False
    sums_as_weight: bool = False

    def missing(self) -> str | None:
        """Returns why it cannot be made here, or None; nothing is imported for that."""
        if self.module and find_spec(self.module) is None:
            return f"{self.package} is not installed"
        if self.function and not hasattr(F, self.function):
            return f"torch {torch.__version__} has no torch.nn.functional.{self.function}"
        return None

    def version(self) -> str:
        """Returns the version of its package after a space; "" for PyTorch, or if there is none."""
        try:
            return f" {version(self.package)}" if self.package else ""
        except PackageNotFoundError:
            return ""

    def is_exact(self, bfloat16: bool) -> bool:
        """Returns whether it skips nothing, and sums nothing over chunks in bfloat16.

        bfloat16: whether the weight has that dtype.
        """
        return not (self.filters or (bfloat16 and self.sums_as_weight))


def softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _core(**options: Any) -> LinearLoss:
    """PyTorch's own fused softmax, which chooses what these options leave open.

    Without an object of options it would keep all logits.
    """
    chosen = nn.LinearCrossEntropyOptions(**options)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=chosen)

    return loss


def _liger(**options: Any) -> LinearLoss:
    """Liger-Kernel's fused softmax. options: arguments of its function, of which older releases
    lack some."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    _, _, _, _, *others = inspect.signature(
        LigerFusedLinearCrossEntropyFunction.forward
    ).parameters.values()
    unknown = options.keys() - {each.name for each in others}
    if unknown:
        raise LabError(f"this release of Liger-Kernel has no {', '.join(unknown)}")
    # a function of autograd takes no keywords
    values = [options.get(each.name, each.default) for each in others]

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, target, *values
        )[0]
        return result

    return loss


def _cut_cross_entropy(exact: bool) -> LinearLoss:
    """Apple's. exact: no block is skipped and sums keep their digits, by a preset or, in releases
    without one, by what they have instead."""
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    presets = {member.name.lower() for member in LinearCrossEntropyImpl}
    options: dict[str, Any] = {}
    if exact and "cce_exact" in presets:
        options = {"impl": "cce_exact"}
    elif exact:
        known = inspect.signature(linear_cross_entropy).parameters
        sums = ("accum_e_fp32", "accum_c_fp32", "use_kahan")
        options = {"filter_eps": None, **{name: True for name in sums if name in known}}

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = linear_cross_entropy(hidden, weight, target, **options)
        return result

    return loss


def _quack() -> LinearLoss:
    """That of Dao-AILab's kernels, which sums in float32."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = chunked_linear_cross_entropy(hidden, weight, target)
        return result

    return loss


_PLAIN: Mapping[str, Peer] = {
    "softmax": Peer(lambda: softmax),
    "softmax, compiled": Peer(lambda: torch.compile(softmax)),
}
_OF_CORE = partial(Peer, function="linear_cross_entropy", sums_as_weight=True)
_OF_LIGER = partial(Peer, package="liger-kernel", module="liger_kernel")
_OF_APPLE = partial(Peer, package="cut-cross-entropy", module="cut_cross_entropy")


def _fused(*chunks: int) -> dict[str, Peer]:
    """PyTorch's fused softmax, which 2.13 brought."""
    return {
        **{f"core, chunk {n}": _OF_CORE(partial(_core, batch_chunk_size=n)) for n in chunks},
        "core, automatic": _OF_CORE(_core),
    }


# On a CPU, and on a GPU.
SOFTMAX: Mapping[str, Peer] = {**_PLAIN, **_fused(64, 256, 1024)}
GPU_SOFTMAX: Mapping[str, Peer] = {
    **_PLAIN,
    **{
        f"softmax, chunks of {n} rows": Peer(partial(chunked_softmax, n, compiled=True))
        for n in (2048, 8192)
    },
    "Liger": _OF_LIGER(_liger, sums_as_weight=True),
    "Liger, float32 sums": _OF_LIGER(partial(_liger, accum_dtype=torch.float32)),
    **{
        f"Liger, float32 sums, memory {n}": _OF_LIGER(
            partial(_liger, accum_dtype=torch.float32, chunk_mem_const=n)
        )
        for n in (8, 32)
    },
    "cut cross-entropy": _OF_APPLE(partial(_cut_cross_entropy, False), filters=True),
    "cut cross-entropy, exact": _OF_APPLE(partial(_cut_cross_entropy, True)),
    "quack": Peer(_quack, package="quack-kernels", module="quack"),
    **_fused(1024, 4096),
    "core, chunk 4096, float32 sums": _OF_CORE(
        partial(_core, batch_chunk_size=4096, acc_policy="balanced"), sums_as_weight=False
    ),
}
