"""The numbers of a machine that explain a table of measured times, and how well they choose.

The cost of an engine is linear in the numbers of `softsphere.engines.machines.Machine`. With two
more unknowns, the time of a FLOP and a time that every step takes whatever its engine and its
sizes, they follow from the measured times by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from softsphere.engines.dispatch import ENGINES, cheapest
from softsphere.engines.engine import Workload
from softsphere.engines.machines import Machine
from softsphere_lab.errors import LabError

__all__ = ["Choices", "Fit", "Times", "choices", "fitted"]

# The seconds of engines by name, at each of several workloads.
Times = Mapping[Workload, Mapping[str, float]]
# The numbers of a machine that a table of times tells. Its limit of memory is a choice, and no
# engine of the table multiplies half precision in float32.
_GIVEN = ("logits_limit", "float32")
_UNKNOWN = tuple(field.name for field in fields(Machine) if field.name not in _GIVEN)
# So much of a number is added to see what it costs, that no rounding beside the FLOPs hides it.
_UNIT = 1 << 20
# A share of a time that measurements do not tell from nothing.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class _On(Workload):
    """A workload on a machine with given numbers."""

    numbers: Machine | None = None

    @property
    def machine(self) -> Machine:
        return self.numbers or super().machine


@dataclass(frozen=True)
class Fit:
    """The numbers of a machine, and how well they explain the times.

    rate: FLOPs in a second. least: the seconds that every step takes. error: the root of the mean
    square of the relative errors.
    """

    machine: Machine
    rate: float
    least: float
    error: float


@dataclass(frozen=True)
class Choices:
    """How good the chosen engines are. mean: the geometric mean of their times in those of the best
    engines. worst: the largest ratio, and the workload that has it.
    """

    mean: float
    worst: float
    at: Workload


def _at(work: Workload, machine: Machine) -> Workload:
    return _On(
        **{field.name: getattr(work, field.name) for field in fields(Workload)}, numbers=machine
    )


def _coefficients(engine: str, work: Workload) -> list[float]:
    """What the unknowns of `fitted` are multiplied with: the FLOPs of an engine, 1 for what every
    step takes, and what a unit of each number of a machine adds to the cost.
    """
    cost, unknown = ENGINES[engine].cost, dict.fromkeys(_UNKNOWN, 0)
    products = cost(_at(work, replace(work.machine, **unknown)))
    with_unit = [
        cost(_at(work, replace(work.machine, **unknown | {name: _UNIT}))) for name in _UNKNOWN
    ]
    return [products, 1.0, *((each - products) / _UNIT for each in with_unit)]


def fitted(times: Times, present: Machine) -> Fit:
    """Returns the numbers, none of them negative, with the least sum of squared relative errors.

    present: the machine as it is known, from which the numbers are that times do not tell.

    Raises LabError if the times do not tell how long a FLOP takes.
    """
    from scipy.optimize import nnls

    rows, count = [], 0
    for work, taken in times.items():
        for name, seconds in taken.items():
            rows.append([x / seconds for x in _coefficients(name, work)])
            count += 1
    A = torch.tensor(rows, dtype=torch.float64)
    scale = A.square().sum(0).sqrt().clamp_min(torch.finfo(A.dtype).tiny)
    solution, residual = nnls((A / scale).numpy(), torch.ones(count, dtype=A.dtype).numpy())
    per_flop, least, *others = (torch.from_numpy(solution) / scale).tolist()
    if per_flop * float(A[:, 0].max()) < _NEGLIGIBLE:
        raise LabError(
            f"the times of these {len(times)} sizes do not tell how long a FLOP takes; measure "
            "larger ones"
        )
    found = dict(zip(_UNKNOWN, (other / per_flop for other in others), strict=True))
    overhead = found.pop("overhead")
    whole = {name: round(x) for name, x in found.items()}
    machine = replace(present, **whole, overhead=overhead)
    return Fit(machine, 1 / per_flop, least, residual / math.sqrt(count))


def choices(times: Times, machine: Machine) -> Choices:
    """Returns how good the engines are that are chosen with the numbers of a machine.

    An engine that was not timed is not chosen.
    """
    ratios = {
        work: taken[cheapest(_at(work, machine), [ENGINES[name] for name in taken])]
        / min(taken.values())
        for work, taken in times.items()
    }
    worst = max(ratios, key=ratios.__getitem__)
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return Choices(mean, ratios[worst], worst)
