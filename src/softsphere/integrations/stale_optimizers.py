"""Optimizers that were made before a model got its output layer, and so do not train it."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

__all__ = ["warn_of_stale_optimizers"]


def warn_of_stale_optimizers(replaced: list[weakref.ref[nn.Parameter]], head: nn.Module) -> None:
    """Warns when an optimizer is stepped that has replaced parameters and none of the head.

    Args:
        replaced: parameters of the former lm_head that the model has no longer. If nothing holds
            them any more, no optimizer does, and there is nothing to watch.
        head: the output layer.

    It is a warning, since another optimizer may have the head.
    """
    if all(p() is None for p in replaced):
        return
    own, told = weakref.ref(head), False

    def check(optimizer: Optimizer, args: Any, options: Any) -> None:
        nonlocal told
        old, layer = {id(p) for each in replaced if (p := each()) is not None}, own()
        if told or not old or layer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held & old and not any(id(p) in held for p in layer.parameters()):
            told = True
            warnings.warn(
                f"this {type(optimizer).__name__} was made before replace_lm_head: it has the "
                "weight of the former lm_head, and not the parameters of the output layer, which "
                "it does not train. Make it after replace_lm_head, or give those parameters to "
                "another optimizer",
                stacklevel=3,
            )

    register_optimizer_step_pre_hook(check)
