"""How long a collective takes on n ranks, from a latency α and a bandwidth 1/β.

Messages of N bytes take α + N β, and a rank sends and receives one at a time. The algorithms are a
ring, whose latencies grow with n, and a tree, in ⌈log₂ n⌉ rounds, which sends more bytes for some
collectives. Libraries choose by the size of the message, which "best" does. The time of adding
numbers in a reduction is left out.

Source: Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication Operations in
MPICH", Int. J. High Performance Computing Applications 19(1), sections 4.1 to 4.5: ring and
recursive doubling for all-gather, pairwise exchange and Bruck's algorithm for all-to-all, recursive
halving for reduce-scatter, recursive doubling and Rabenseifner's algorithm for all-reduce. The ring
for reductions: Patarasu & Yuan 2009, J. Parallel and Distributed Computing 69(2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["ALGORITHMS", "MODELS", "Collective", "Network", "seconds", "sent"]


@dataclass(frozen=True)
class Network:
    """latency: α, the seconds before a message arrives. bandwidth: bytes a second of one rank."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Collective:
    """The messages that a rank sends one after the other, and their bytes, by algorithm.

    Both are functions of the bytes that the rank gives and of the number of ranks.
    """

    ring: Callable[[float, int], tuple[float, float]]
    trees: tuple[Callable[[float, int], tuple[float, float]], ...]


def _rounds(n: int) -> int:
    return math.ceil(math.log2(n))


# What a rank gives: to an all-gather its part, to the others its whole buffer.
MODELS: Mapping[str, Collective] = {
    "all_gather": Collective(
        ring=lambda b, n: (n - 1, (n - 1) * b),
        trees=(lambda b, n: (_rounds(n), (n - 1) * b),),
    ),
    "all_to_all": Collective(
        ring=lambda b, n: (n - 1, (n - 1) / n * b),
        trees=(lambda b, n: (_rounds(n), b / 2 * _rounds(n)),),
    ),
    "reduce_scatter": Collective(
        ring=lambda b, n: (n - 1, (n - 1) / n * b),
        trees=(lambda b, n: (_rounds(n), (n - 1) / n * b),),
    ),
    "all_reduce": Collective(
        ring=lambda b, n: (2 * (n - 1), 2 * (n - 1) / n * b),
        trees=(
            lambda b, n: (_rounds(n), _rounds(n) * b),
            lambda b, n: (2 * _rounds(n), 2 * (n - 1) / n * b),
        ),
    ),
}
ALGORITHMS = ("ring", "tree", "best")


def seconds(name: str, given: float, ranks: int, network: Network, algorithm: str) -> float:
    """Returns the time of a collective to which each rank gives so many bytes.

    algorithm: "ring", "tree", or "best" for the faster of both.

    >>> network = Network(latency=1e-6, bandwidth=1e9)
    >>> f"{seconds('all_gather', 1000, 5, network, 'ring'):.2g}"  # 4 · (1 µs + 1 µs)
    '8e-06'
    """
    model = MODELS[name]
    chosen = {"ring": (model.ring,), "tree": model.trees, "best": (model.ring, *model.trees)}
    found = [way(given, ranks) for way in chosen[algorithm]]
    return min(count * network.latency + size / network.bandwidth for count, size in found)


def sent(name: str, given: float, ranks: int) -> float:
    """Returns the bytes that a rank sends in a collective when a ring carries it out.

    >>> sent("all_gather", 100, 4), sent("all_to_all", 100, 4), sent("all_reduce", 100, 4)
    (300, 75.0, 150.0)
    """
    return MODELS[name].ring(given, ranks)[1]
