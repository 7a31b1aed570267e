"""Arguments that a layer takes when it is made, and never later."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["LINEAR_HAS_IT", "ConstructorArgument"]

# What to do about an option that only a LinearSphericalLoss has, by its name there.
LINEAR_HAS_IT = "use a LinearSphericalLoss, which has it"


class ConstructorArgument:
    """An attribute with the name of an argument that only the constructor takes, or no layer of it.

    Assigning another value raises AttributeError, where a module of PyTorch would keep the new one
    and go on with the old one. `OutputLayer` calls `__set__` by itself, since `nn.Module` keeps a
    parameter or a module from descriptors.

    Args:
        kept: whether the constructor keeps the argument under its name.
        read: the attribute that has its value, if there is one under another name.
        instead: how to have another value.
    """

    def __init__(
        self,
        *,
        kept: bool = False,
        read: str | None = None,
        instead: str = "make a new layer with it",
    ) -> None:
        self.kept, self.read, self.instead = kept, read, instead

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        if layer is None:
            return self
        if self.read is not None:
            return getattr(layer, self.read)
        if self.name not in layer.__dict__:
            raise AttributeError(self.name)  # in the words of nn.Module
        return layer.__dict__[self.name]

    def __set__(self, layer: nn.Module, value: Any) -> None:
        known = layer.__dict__.get(self.name, value)
        if not self.kept or type(known) is not type(value) or known != value:
            raise AttributeError(self._refusal(layer))
        layer.__dict__[self.name] = value

    def __delete__(self, layer: nn.Module) -> None:
        raise AttributeError(self._refusal(layer))

    def _refusal(self, layer: nn.Module) -> str:
        return f"{self.name} of a {type(layer).__name__} cannot be changed; {self.instead}"
