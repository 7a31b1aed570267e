"""How the statistics of a linear output layer are to be computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softsphere import checks

__all__ = ["ENGINES", "LinearSphericalOptions", "options_or_default"]

ENGINES = ("auto", "dense", "chunked", "gram", "triton")

# Who works in chunks of the weight's rows, and who in tiles of rows and classes.
BY_CLASSES = ("auto", "chunked", "gram", "triton")
BY_ROWS = ("auto", "chunked")


@dataclass(frozen=True)
class LinearSphericalOptions:
    """Options of `softsphere.LinearSphericalLoss` and `functional.linear_spherical_loss`.

    engine: "auto" asks `softsphere.engines.choose`; a name is never replaced by another engine
    row_chunk, class_chunk: rows of the input and of the weight in one piece of work (None: by
        size); of the chunked engine, class_chunk also of gram and triton. With "auto", for when
        one of those is chosen
    accumulate_dtype: of sums over classes, at least: float32 or float64. Of what they are sums of,
        too, but for the outputs of the dense engine, which have the dtype of the input
    deterministic: no atomic additions on a GPU, which differ from run to run in the last digit

    >>> LinearSphericalOptions(engine="gram", accumulate_dtype=torch.float64).engine
    'gram'
    """

    engine: str = "auto"
    row_chunk: int | None = None
    class_chunk: int | None = None
    accumulate_dtype: torch.dtype = torch.float32
    deterministic: bool = False

    def __post_init__(self) -> None:
        checks.one_of("engine", self.engine, ENGINES)
        for name, engines in (("row_chunk", BY_ROWS), ("class_chunk", BY_CLASSES)):
            size = getattr(self, name)
            if size is None:
                continue
            checks.at_least_one(name, size)
            if self.engine not in engines:
                raise ValueError(
                    f"{name} has no meaning for engine={self.engine!r}, got {size}; "
                    f"leave it None, or use one of {', '.join(engines)}"
                )
        if self.accumulate_dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "accumulate_dtype must be torch.float32 or torch.float64, "
                f"got {self.accumulate_dtype}"
            )
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"deterministic must be True or False, got {self.deterministic!r}")


def options_or_default(options: LinearSphericalOptions | None) -> LinearSphericalOptions:
    if options is None:
        return LinearSphericalOptions()
    if not isinstance(options, LinearSphericalOptions):
        raise TypeError(f"options must be LinearSphericalOptions, got {options!r}")
    return options
