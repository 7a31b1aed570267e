"""The registry of handlings: what users do to an output layer with PyTorch's tools.

A handling takes a `Subject`, trains or treats its model, and returns numbers: a dict of tensors.
They must be the same for every kind of output layer. Where a factored layer cannot do it, the
handling says with which error it refuses, and then nothing may have changed. Registering a new
handling in one of the modules `_handlings_*` is all that it takes to test it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from _subject import Subject

Run = Callable[[Subject], dict[str, Tensor]]


@dataclass(frozen=True)
class Handling:
    """One handling.

    run: does it, and returns numbers.
    refusal: the error of a factored layer and words of it; None if the layer can do it.
    bias: whether the output layer has a bias.
    unmoved: whether a refusal leaves the model as it was before `run` was called.
    needs: a module without which the handling is skipped.
    like_linear: whether it needs the state of nn.Linear. A clustered layer has more than that.
    """

    run: Run
    refusal: tuple[type[Exception], str] | None = None
    bias: bool = True
    unmoved: bool = True
    needs: str | None = None
    like_linear: bool = False


HANDLINGS: dict[str, Handling] = {}


def register(name: str, run: Run, **options: Any) -> None:
    assert name not in HANDLINGS, name
    HANDLINGS[name] = Handling(run, **options)


def handling(name: str, **options: Any) -> Callable[[Run], Run]:
    """Registers the function below it."""

    def enter(run: Run) -> Run:
        register(name, run, **options)
        return run

    return enter
