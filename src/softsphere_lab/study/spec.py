"""Losses as users write them on the command line: `name` or `name:key=value:key=value`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from softsphere import losses
from softsphere_lab.errors import LabError
from softsphere_lab.study.search import Axis, Space

__all__ = ["AXES", "LossSpec", "axes_config", "distinct"]

# The axes along which tuning searches for a loss's own numbers.
AXES: dict[str, dict[str, Axis]] = {
    "spherical_softmax": {"eps": Axis((1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0), 0.1)},
    "z_loss": {
        "a": Axis((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 0.3),
        "b": Axis((0.03125, 0.125, 0.5, 2.0, 8.0, 32.0, 128.0, 512.0), 8.0),
    },
    "soft_margin_softmax": {"margin": Axis((0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 1.0)},
}


@dataclass(frozen=True)
class LossSpec:
    """A name of the registry and the numbers that were given for it, in order of their names."""

    name: str
    given: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> LossSpec:
        """Reads a spec. Raises LabError with what the loss takes.

        >>> LossSpec.parse("z_loss:a=0.5:b=2").loss()
        ZLoss(a=0.5, b=2.0)
        """
        name, *pairs = text.strip().split(":")
        if name not in losses.REGISTRY:
            raise LabError(
                f"--losses knows {', '.join(losses.REGISTRY)}, got {name!r}; `softsphere losses` "
                "lists them with their numbers"
            )
        known = {field.name: str(field.type) for field in fields(losses.REGISTRY[name])}
        given: dict[str, float] = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in known:
                takes = ", ".join(known) or "no numbers"
                raise LabError(f"--losses: {name} takes {takes}, got {pair!r}")
            if key in given:
                raise LabError(f"--losses: {name} was given {key} twice")
            given[key] = _parse_number(
                f"{name}:{key}", value, int if "int" in known[key] else float
            )
        spec = cls(name, tuple(sorted(given.items())))
        try:
            spec.loss()
        except (TypeError, ValueError) as error:
            raise LabError(f"--losses: {error}") from error
        return spec

    def loss(self) -> losses.Loss:
        """Returns the loss itself."""
        return losses.REGISTRY[self.name](**dict(self.given))

    def axes(self, tune: bool) -> dict[str, Axis]:
        """Returns the axes of the numbers that can be tuned and were not given."""
        axes = AXES.get(self.name, {}) if tune else {}
        return {key: axis for key, axis in axes.items() if key not in dict(self.given)}

    def with_values(self, values: Mapping[str, float]) -> LossSpec:
        """Returns this spec with values for numbers that were not given.

        >>> str(LossSpec.parse("z_loss:b=2").with_values({"a": 1.0}))
        'z_loss:a=1:b=2'
        """
        return LossSpec(self.name, tuple(sorted({**dict(self.given), **values}.items())))

    def same(self, other: LossSpec, tune: bool) -> bool:
        """Returns whether both choose from the same losses, however they are spelled."""
        free, others = self.axes(tune), other.axes(tune)
        start = {key: axis.start for key, axis in free.items()}
        return free == others and self.with_values(start).loss() == other.with_values(start).loss()

    def __str__(self) -> str:
        """Returns what `parse` reads back as the same numbers.

        >>> str(LossSpec.parse("z_loss:b=2.50:a=1.0"))
        'z_loss:a=1:b=2.5'
        """
        given = (f"{key}={repr(value).removesuffix('.0')}" for key, value in self.given)
        return ":".join([self.name, *given])


def axes_config(tune: bool, **others: Axis) -> dict[str, Any]:
    """Returns all axes that a search may go along, as JSON.

    tune: whether a loss's own numbers are searched for. others: further axes by name.
    """
    own = {f"{name}:{key}": axis for name, axes in AXES.items() for key, axis in axes.items()}
    return Space({**(own if tune else {}), **others}).config()


def _parse_number(name: str, text: str, kind: type[int] | type[float]) -> float:
    """Reads a number that a network in float32 can tell from zero and from infinity."""
    try:
        value = kind(text)
    except ValueError as error:
        wanted = "an integer" if kind is int else "a number"
        raise LabError(f"--losses: {name} must be {wanted}, got {text!r}") from error
    if kind is float:
        single = float(torch.tensor(value, dtype=torch.float32))
        if (single == 0) != (value == 0) or abs(single) == float("inf"):
            raise LabError(f"--losses: {name} must be within the range of float32, got {text!r}")
    return value


def distinct(specs: Iterable[LossSpec], tune: bool) -> tuple[LossSpec, ...]:
    """Returns each loss once, as it was spelled first.

    While numbers are tuned, a loss with a free number is another one than with that number given.

    >>> one, other = LossSpec.parse("z_loss"), LossSpec.parse("z_loss:a=1:b=4")
    >>> len(distinct([one, other], tune=False)), len(distinct([one, other], tune=True))
    (1, 2)
    """
    first: list[LossSpec] = []
    for spec in specs:
        if not any(spec.same(other, tune) for other in first):
            first.append(spec)
    return tuple(first)
