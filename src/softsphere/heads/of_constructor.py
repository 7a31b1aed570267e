"""Arguments that a layer takes when it is made, and never later."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["OfConstructor"]


class OfConstructor:
    """An attribute with the name of an argument that only the constructor takes.

    Assigning it raises AttributeError, where a module of PyTorch would keep the new value and go on
    with the old one.

    Args:
        kept: whether the constructor keeps the argument under its name, which it may assign once.
        instead: how to have another value.
    """

    def __init__(self, *, kept: bool = False, instead: str = "make a new layer with it") -> None:
        self.kept, self.instead = kept, instead

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        if layer is None:
            return self
        if self.name not in layer.__dict__:
            raise AttributeError(f"a {type(layer).__name__} does not keep {self.name}")
        return layer.__dict__[self.name]

    def __set__(self, layer: nn.Module, value: Any) -> None:
        if not self.kept or self.name in layer.__dict__:
            raise AttributeError(
                f"{self.name} of a {type(layer).__name__} cannot be changed; {self.instead}"
            )
        layer.__dict__[self.name] = value
