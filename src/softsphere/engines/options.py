"""How the statistics of a linear output layer are to be computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softsphere import checks
from softsphere.engines.dispatch import ENGINES

__all__ = ["LinearSphericalOptions", "options_or_default"]


@dataclass(frozen=True)
class LinearSphericalOptions:
    """Options of `softsphere.LinearSphericalLoss` and `functional.linear_spherical_loss`.

    Args:
        engine: "dense", "chunked", "gram", or "auto", which takes the engine that
            `softsphere.engines.choose` returns. A named engine is never replaced by another one,
            so engine="gram" gives q with an error of about 30 eps Σ_j h_j² S_jj, however small q
            itself is (see `softsphere.engines.choose`, which says what "auto" does about it).
        row_chunk: number of rows of the input in one piece of work; None leaves it to the engine.
            Only the chunked engine has a use for it.
        class_chunk: number of rows of the weight in one piece of work; None leaves it to the
            engine. The chunked and the gram engine have a use for it. With "auto" both apply if an
            engine is chosen that has a use for them.
        accumulate_dtype: the least precise dtype in which sums over classes are taken, float32 or
            float64. The summands have this dtype as well, except that the outputs of the dense
            engine are computed in the dtype of the input. Products in float32 are as exact as
            `torch.set_float32_matmul_precision` says, which those in float64 do not depend on.
        deterministic: whether to avoid atomic additions on a GPU, whose results differ from run to
            run in the last digit.

    Raises ValueError or TypeError if an option is out of range, has a wrong type, or has no
    meaning for the engine.

    >>> LinearSphericalOptions(engine="gram", accumulate_dtype=torch.float64).engine
    'gram'
    """

    engine: str = "auto"
    row_chunk: int | None = None
    class_chunk: int | None = None
    accumulate_dtype: torch.dtype = torch.float32
    deterministic: bool = False

    def __post_init__(self) -> None:
        checks.one_of("engine", self.engine, ("auto", *ENGINES))
        for name in ("row_chunk", "class_chunk"):
            size = getattr(self, name)
            if size is None:
                continue
            checks.at_least_one(name, size)
            able = ["auto", *(x.name for x in ENGINES.values() if name in x.chunks)]
            if self.engine not in able:
                raise ValueError(
                    f"{name} has no meaning for engine={self.engine!r}, got {size}; "
                    f"leave it None, or use one of {', '.join(able)}"
                )
        if self.accumulate_dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "accumulate_dtype must be torch.float32 or torch.float64, "
                f"got {self.accumulate_dtype}"
            )
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"deterministic must be True or False, got {self.deterministic!r}")


def options_or_default(options: LinearSphericalOptions | None) -> LinearSphericalOptions:
    """Returns the options, or the default ones for None; raises TypeError for anything else."""
    if options is None:
        return LinearSphericalOptions()
    if not isinstance(options, LinearSphericalOptions):
        raise TypeError(f"options must be LinearSphericalOptions, got {options!r}")
    return options
