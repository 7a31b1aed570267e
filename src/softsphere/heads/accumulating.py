"""Gradient accumulation of a linear output layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from softsphere._torch import is_wrapper
from softsphere.engines import LinearSphericalOptions
from softsphere.engines.accumulation import Accumulation
from softsphere.engines.pending import refuse_step
from softsphere.functional.on_linear import Affine, outside_of_accumulate, without_logits
from softsphere.losses import Loss

__all__ = ["AccumulatingLayer"]


class AccumulatingLayer(nn.Module, ABC):
    """A linear output layer that accumulates the gradients of many batches at the cost of one."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    loss: Loss
    label_smoothing: float
    options: LinearSphericalOptions

    def __init__(self) -> None:
        super().__init__()
        self.accumulation: Accumulation | None = None

    @abstractmethod
    def _layer(self) -> Affine:
        """Weight and bias, which fit together."""

    def _accumulated(self, layer: Affine) -> dict[str, Any]:
        """What an accumulation depends on, by the names of its arguments."""
        return {
            "W": layer.weight,
            "b": layer.bias,
            "pi": self.vectors["prior"],
            "centred": self.loss.shift_invariant,
            "options": self.options,
        }

    @property
    @abstractmethod
    def vectors(self) -> dict[str, Tensor | None]:
        """The vectors with a number for each row of the weight, `prior` among them."""

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Accumulates the gradients of many batches for about the cost of one.

        It is a context manager. Inside, the Gram matrix of the weight is computed once. Each
        backward adds its small share and keeps its rows of hidden. When the context ends, autograd
        delivers the sum of all gradients at once, through all hooks. Until then `weight.grad` and
        `bias.grad` are pending: zero_grad forgets them, and any other access raises. Step the
        optimizer after the context. If an exception leaves it, nothing is added. Under autocast the
        weight is not rounded.

        DistributedDataParallel reduces the gradients of this layer at the end. Run forward and
        backward of every micro-batch but the last under its no_sync().

        Raises RuntimeError

        * if it is nested, if the weight is changed or its gradient is read inside (a change through
          `.data` or NumPy is looked for in some rows only),
        * if backward is called after it or asks for second derivatives,
        * if backward, with hooks or a process group, computes the gradients of only some
          parameters,
        * under data-parallel wrappers that shard the weight, look for unused parameters, or share
          it with another layer.

        Raises ValueError or TypeError for anything that the gram engine cannot compute.

        >>> import softsphere, torch
        >>> head = softsphere.LinearSphericalLoss(8, 1000)
        >>> with head.accumulate():
        ...     for _ in range(4):
        ...         (head(torch.randn(2, 8), torch.tensor([1, 5])) / 4).backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 8])
        """
        if self.accumulation is not None:
            raise RuntimeError("accumulate() cannot be nested; leave the one that is open first")
        _check_accumulable("weight", self.weight, 2)
        if self.bias is not None:
            _check_accumulable("bias", self.bias, 1)
        try:
            with self._accumulating() as kept:
                self.accumulation = kept
                yield
        finally:
            self.accumulation = None

    @contextmanager
    def _accumulating(self) -> Iterator[Accumulation]:
        """Yields what keeps the Gram matrix, and delivers the gradients when the context ends."""
        if self.options.engine not in ("auto", "gram"):
            raise ValueError(
                f"accumulate() uses the gram engine, got engine={self.options.engine!r}; "
                "use engine='gram' or 'auto'"
            )
        refusal = without_logits(self.loss, self.label_smoothing, soft=False)
        if refusal:
            raise outside_of_accumulate(refusal)
        kept = Accumulation(**self._accumulated(self._layer()))
        optimizers = register_optimizer_step_pre_hook(refuse_step)
        try:
            yield kept
            kept.finish()
        finally:
            optimizers.remove()
            kept.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not inside the accumulate() of the original.
        return {**self.__dict__, "accumulation": None}


def _check_accumulable(name: str, x: Any, dim: int) -> None:
    """Raises RuntimeError if accumulate() cannot compute with x or add to its gradient."""
    if not x.is_leaf:
        raise RuntimeError(
            f"accumulate() adds to {name}.grad, but the {name} is computed from something else "
            "(a parametrization); remove that, or accumulate without this context"
        )
    if is_wrapper(x) or x.dim() != dim:
        wanted = "(num_classes, in_features)" if dim == 2 else "(num_classes,)"
        raise RuntimeError(
            f"accumulate() needs the whole {name} as a plain tensor of shape {wanted}, got "
            f"{type(x).__name__} of shape {tuple(x.shape)}, as sharding wrappers make it "
            "(fully_shard); accumulate without this context"
        )
