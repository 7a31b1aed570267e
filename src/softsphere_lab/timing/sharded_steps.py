"""What a training step of a sharded output layer sends, keeps and computes, as formulas.

D classes are sharded over n ranks, whose batches have m rows together, M = ⌈m / n⌉ each. Numbers
are float32, losses are not centred, each row has one target, and there is no bias. One with the
factored layer counts as one more column of d. The clustered layer has no shortlist and ⌈√D⌉ equal
clusters, among which the targets are spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from softsphere_lab.timing import collectives
from softsphere_lab.timing.collectives import Network
from softsphere_lab.timing.setting import Setting

__all__ = [
    "CLUSTERED",
    "FACTORED",
    "GRAM",
    "SHARDED",
    "SOFTMAX",
    "Call",
    "Machine",
    "ShardedLayer",
    "Step",
    "number_of_clusters",
    "scales_to",
    "simulated",
]

# A collective, and the bytes that each rank gives to it.
Call = tuple[str, int]
GRAM, FACTORED, CLUSTERED, SOFTMAX = "gram", "factored", "clustered", "softmax"
# Bytes of a number, of a class index, and of the message by which ranks agree to begin.
_E, _INDEX, _AGREEMENT = 4, 8, 208
# Doubling the ranks has to save this share of the time of a step.
_WORTH = 0.1


@dataclass(frozen=True)
class ShardedLayer:
    """One kind of output layer. All are functions of the setting, m in all, and of n.

    calls: the collectives of a step, in their order.
    kept: bytes of a rank for the rows of the weight, their gradient and what is kept beside them,
        without the state of the optimizer.
    state: bytes of a rank for each number that the optimizer keeps for a number of the weight.
    at_work: the largest arrays that a rank has besides in a step, in bytes.
    flops: of a rank.
    """

    calls: Callable[[Setting, int], list[Call]]
    kept: Callable[[Setting, int], int]
    state: Callable[[Setting, int], int]
    at_work: Callable[[Setting, int], int]
    flops: Callable[[Setting, int], float]

    def sent(self, setting: Setting, ranks: int) -> float:
        """The bytes that a rank sends in a step."""
        return sum(collectives.sent(name, b, ranks) for name, b in self.calls(setting, ranks))


def _gram_calls(s: Setting, n: int, prior: bool = False) -> list[Call]:
    M, columns = _share(s.m, n), 3 + prior
    return [
        ("all_gather", _AGREEMENT),
        ("all_gather", _INDEX * M),
        ("all_gather", _E * M * s.d),
        ("all_to_all", _E * n * M * columns),
        ("all_gather", 2 * _E),
        ("all_gather", _E * M * columns),
        ("all_to_all", _E * n * M * s.d),
    ]


def _factored_calls(s: Setting, n: int, prior: bool = False) -> list[Call]:
    M = _share(s.m, n)
    of_targets = [("all_reduce", _E * n * M)] if prior else []
    return [
        ("all_gather", _AGREEMENT),
        ("all_gather", _E * M * s.d),
        ("all_gather", _INDEX * M),
        *of_targets,
        ("all_reduce", _E * n * M * s.d),
        ("all_gather", 2 * _E),
        ("all_gather", _E * M * 3),
        *of_targets,
    ]


def _clustered_calls(s: Setting, n: int, prior: bool = False) -> list[Call]:
    """Those of any prior, which a rank has for its own clusters."""
    M, found = _share(s.m, n), 3
    return [
        ("all_gather", _AGREEMENT),
        ("all_gather", _INDEX * M),
        ("all_gather", _E * M * s.d),
        ("all_to_all", _E * n * M * found),
        ("all_gather", 2 * _E),
        ("all_to_all", _E * n * M * found),
        ("all_to_all", _E * n * M * s.d),
    ]


def number_of_clusters(s: Setting) -> int:
    """C = ⌈√D⌉."""
    return math.isqrt(s.D - 1) + 1


def _clustered_rows(s: Setting, n: int) -> int:
    """The rows of the root and of the leaves that a rank has."""
    return _share(number_of_clusters(s), n) + _share(s.D, n)


def _clustered_flops(s: Setting, n: int) -> float:
    C = number_of_clusters(s)
    outputs = s.m * _share(C, n) + _share(s.m, n) * _share(s.D, C)
    return 6.0 * s.d * outputs


def _softmax_calls(s: Setting, n: int) -> list[Call]:
    """Those of `loss_parallel` on rows that are sharded as well."""
    M = _share(s.m, n)
    return [
        ("all_gather", _INDEX * M),
        ("all_gather", _E * M * s.d),
        *[("all_reduce", _E * n * M)] * 3,
        ("reduce_scatter", _E * n * M * s.d),
    ]


def _weight(s: Setting, n: int) -> int:
    return _E * _share(s.D, n) * s.d


def _factored_flops(s: Setting, n: int) -> float:
    """Every rank takes the whole step of the small factors."""
    m, d = float(s.m), float(s.d)
    return 14 * m * d * d + 10 * m * m * d if m < d else 12 * m * d * d + 14 * d**3


SHARDED: Mapping[str, ShardedLayer] = {
    GRAM: ShardedLayer(
        calls=_gram_calls,
        kept=lambda s, n: 2 * _weight(s, n),
        state=_weight,
        at_work=lambda s, n: 3 * _E * s.m * s.d,
        flops=lambda s, n: 4 * _share(s.D, n) * s.d**2 + 4 * s.m * s.d**2,
    ),
    FACTORED: ShardedLayer(
        calls=_factored_calls,
        kept=lambda s, n: _weight(s, n) + _share(s.D, n) + 32 * s.d**2,
        state=_weight,
        at_work=lambda s, n: 4 * _E * s.m * s.d,
        flops=_factored_flops,
    ),
    CLUSTERED: ShardedLayer(
        calls=_clustered_calls,
        kept=lambda s, n: (
            2 * _E * s.d * _clustered_rows(s, n) + _INDEX * 4 * s.D + 28 * _share(s.D, n)
        ),
        state=lambda s, n: _E * s.d * _clustered_rows(s, n),
        at_work=lambda s, n: _E * s.m * (3 * s.d + 2 * _share(number_of_clusters(s), n)),
        flops=_clustered_flops,
    ),
    SOFTMAX: ShardedLayer(
        calls=_softmax_calls,
        kept=lambda s, n: 2 * _weight(s, n),
        state=_weight,
        at_work=lambda s, n: 2 * _E * s.m * _share(s.D, n),
        flops=lambda s, n: 6 * s.m * _share(s.D, n) * s.d,
    ),
}


@dataclass(frozen=True)
class Machine:
    """The ranks: their network, and the FLOPs a second that one of them has."""

    network: Network
    flops: float
    algorithm: str = "best"


@dataclass(frozen=True)
class Step:
    """Seconds of a step that are spent on products and on collectives."""

    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        return self.computing + self.sending


def simulated(layer: str, setting: Setting, ranks: int, machine: Machine) -> Step:
    """Returns the time of a step if nothing overlaps, and if products have the whole FLOP rate."""
    kind = SHARDED[layer]
    sending = sum(
        collectives.seconds(name, size, ranks, machine.network, machine.algorithm)
        for name, size in (kind.calls(setting, ranks) if ranks > 1 else [])
    )
    return Step(kind.flops(setting, ranks) / machine.flops, sending)


def scales_to(layer: str, setting: Setting, machine: Machine, most: int) -> int:
    """Returns the number of ranks, a power of 2, beyond which doubling saves less than a tenth.

    most: the largest number that is looked at.
    """
    ranks = 1
    now = simulated(layer, setting, ranks, machine).seconds
    while 2 * ranks <= most:
        then = simulated(layer, setting, 2 * ranks, machine).seconds
        if then > (1 - _WORTH) * now:
            break
        ranks, now = 2 * ranks, then
    return ranks


def _share(x: int, n: int) -> int:
    """⌈x / n⌉, what each rank has of x rows or classes."""
    return -(-x // n)
