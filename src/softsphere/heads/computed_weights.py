"""Weights that a hook computes before every forward, as pruning does, and the older norms."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from softsphere._torch import hooks_of

__all__ = ["compute_weights", "has_computed_weights"]


def has_computed_weights(module: nn.Module) -> bool:
    """Whether a hook computes a weight of the module before every forward."""
    kinds = (BasePruningMethod, WeightNorm, SpectralNorm)
    return any(isinstance(hook, kinds) for _, hook in hooks_of(module))


def compute_weights(module: nn.Module) -> None:
    """Computes the weights of a module from their present parts, as its next call would.

    A prediction is a method, which runs no hooks, and would read the weight of the last forward.
    Spectral normalisation takes no step of its power iteration, as in evaluation mode.
    """
    for _, hook in hooks_of(module):
        if isinstance(hook, (BasePruningMethod, WeightNorm)):
            hook(module, ())
        elif isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
