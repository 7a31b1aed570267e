"""Losses as users write them on the command line: `name` or `name:key=value:key=value`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from softsphere import losses
from softsphere.lab.errors import LabError

__all__ = ["LossSpec"]

# What tuning tries for the hyper-parameters that are a loss's own.
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "spherical_softmax": {"eps": (0.01, 0.1, 1.0)},
    "z_loss": {"a": (0.3, 1.0), "b": (2.0, 8.0)},
    "soft_margin_softmax": {"margin": (0.3, 1.0, 3.0)},
}


@dataclass(frozen=True)
class LossSpec:
    """A name of the registry and the hyper-parameters that were given for it."""

    name: str
    given: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> LossSpec:
        """
        >>> LossSpec.parse("z_loss:a=0.5:b=2").loss()
        ZLoss(a=0.5, b=2.0)
        """
        name, *pairs = text.strip().split(":")
        if name not in losses.REGISTRY:
            raise LabError(f"--losses knows {', '.join(losses.REGISTRY)}, got {name!r}")
        known = {field.name: str(field.type) for field in fields(losses.REGISTRY[name])}
        given = []
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in known:
                takes = ", ".join(known) or "no hyper-parameters"
                raise LabError(f"--losses: {name} takes {takes}, got {pair!r}")
            try:
                given.append((key, int(value) if "int" in known[key] else float(value)))
            except ValueError as error:
                raise LabError(f"--losses: {name}:{key} must be a number, got {value!r}") from error
        spec = cls(name, tuple(given))
        try:
            spec.loss()
        except (TypeError, ValueError) as error:
            raise LabError(f"--losses: {error}") from error
        return spec

    def loss(self) -> losses.Loss:
        """The loss itself."""
        return losses.REGISTRY[self.name](**dict(self.given))

    def candidates(self) -> Iterator[LossSpec]:
        """This spec with every setting of what was not given but can be tuned."""
        grid = {k: v for k, v in GRID.get(self.name, {}).items() if k not in dict(self.given)}
        for values in itertools.product(*grid.values()):
            yield replace(self, given=self.given + tuple(zip(grid, values, strict=True)))

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{key}={value:g}" for key, value in self.given)])
