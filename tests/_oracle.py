"""Explicit float64 definitions, in plain Python loops. Imports nothing from the package."""

from __future__ import annotations

import math


def numerator(kind: str, o: float, **p: float) -> float:
    if kind == "softmax":
        return math.exp(o)
    if kind == "taylor":
        return sum(o**i / math.factorial(i) for i in range(int(p["order"]) + 1))
    if kind == "spherical":
        return o * o + p["eps"]
    raise KeyError(kind)


def likelihood(kind: str, **p: float):
    def loss(o: list[float], t: int, pi: list[float]) -> float:
        total = sum(pi[k] * numerator(kind, o[k], **p) for k in range(len(o)))
        return -math.log(pi[t] * numerator(kind, o[t], **p) / total)

    return loss


def squared_error(unobserved: float):
    def loss(o: list[float], t: int, pi: list[float]) -> float:
        y = [float(k == t) for k in range(len(o))]
        return squared_error_vector(o, y, pi, unobserved)

    return loss


def squared_error_vector(
    o: list[float], y: list[float], pi: list[float], unobserved: float
) -> float:
    each = [unobserved * x**2 if v == 0 else (x - v) ** 2 for x, v in zip(o, y, strict=True)]
    return sum(pi[k] * each[k] for k in range(len(o)))


def z_loss(a: float, b: float):
    def loss(o: list[float], t: int, pi: list[float]) -> float:
        mass = sum(pi)
        mu = sum(pi[k] * o[k] for k in range(len(o))) / mass
        var = sum(pi[k] * (o[k] - mu) ** 2 for k in range(len(o))) / mass
        return math.log(1 + math.exp(a * (b - (o[t] - mu) / math.sqrt(var)))) / a

    return loss


def bohning(o: list[float], t: int, pi: list[float]) -> float:
    mass = sum(pi)
    mu = sum(pi[k] * o[k] for k in range(len(o))) / mass
    spread = sum(pi[k] * (o[k] - mu) ** 2 for k in range(len(o)))
    return math.log(mass) + mu + spread / 4 - o[t] - math.log(pi[t])


def bouchard(o: list[float], t: int, pi: list[float]) -> float:
    """The bound before any minimisation, minimised over α and ξ by golden-section search."""
    mass = sum(pi)

    def at(xi: float) -> float:
        lam = math.tanh(xi / 2) / (4 * xi)
        # The minimum over α of a quadratic: α + Σ π (λ((o−α)² − ξ²) + (o−α−ξ)/2 + log(1+e^ξ))
        alpha = (sum(p * x for p, x in zip(pi, o, strict=True)) * 2 * lam + mass / 2 - 1) / (
            2 * lam * mass
        )
        total = alpha
        for p, x in zip(pi, o, strict=True):
            total += p * (
                lam * ((x - alpha) ** 2 - xi * xi)
                + (x - alpha - xi) / 2
                + xi
                + math.log1p(math.exp(-xi))
            )
        return total

    low, high = 1e-9, 200.0
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(300):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if at(left) < at(right) else (left, high)
    return at((low + high) / 2) - o[t] - math.log(pi[t])


def soft_margin(margin: float, kind: str, **p: float):
    def loss(o: list[float], t: int, pi: list[float]) -> float:
        own = pi[t] * numerator(kind, o[t] - margin, **p)
        rest = sum(pi[k] * numerator(kind, o[k], **p) for k in range(len(o)) if k != t)
        return -math.log(own / (own + rest))

    return loss


def partials(
    name: str, s: float, q: float, c: float, mass: float, y: float, pi: float
) -> tuple[float, float, float]:
    """d(y ℓ)/d(s, q, c) in closed form, with the hyper-parameters of `_cases`."""
    if name == "squared_error":
        return 0.0, 1.0, -2 * pi * y
    if name == "squared_error_unobserved":
        return 0.0, 0.2, 2 * pi * (0.8 * c - y)
    if name == "taylor_softmax":
        n = mass + s + q / 2
        return y / n, y / (2 * n), -y * (1 + c) / (1 + c + c * c / 2)
    if name == "spherical_softmax":
        return 0.0, y / (q + mass * 0.3), -2 * y * c / (c * c + 0.3)
    if name == "bohning_bound":
        return y * (1 / mass - s / (2 * mass)), y / 4, -y
    mu = s / mass
    variance = q / mass - mu * mu
    if name == "z_loss":
        a, b, sigma = 0.7, 2.0, math.sqrt(variance)
        z = (c - mu) / sigma
        g = -y / (1 + math.exp(-a * (b - z)))
        ds = g * (-1 / (mass * sigma) + z * mu / (mass * variance))
        return ds, -g * z / (2 * mass * variance), g / sigma
    if name == "bouchard_bound":
        low, high = 1e-9, 200.0
        for _ in range(200):  # ξ² = v + ((M−2)/(4Mλ))², by bisection
            xi = (low + high) / 2
            lam = math.tanh(xi / 2) / (4 * xi)
            if xi * xi < variance + ((mass - 2) / (4 * mass * lam)) ** 2:
                low = xi
            else:
                high = xi
        return y * (1 / mass - 2 * lam * s / mass), y * lam, -y
    raise KeyError(name)


def expected_counts(weight: list[float], n: int) -> list[float]:
    """min(1, λ w_k) with a sum of n, or all 1 for n of at least their number; λ by bisection."""
    if n >= len(weight):
        return [1.0] * len(weight)
    low, high = 0.0, n / min(weight)
    for _ in range(300):
        middle = (low + high) / 2
        if sum(min(1.0, middle * w) for w in weight) < n:
            low = middle
        else:
            high = middle
    return [min(1.0, high * w) for w in weight]


def sampled_softmax(o: list[float], t: int, negatives: list[int], expected: list[float]) -> float:
    """−log of the share of the target, whose own output is not corrected; `expected` is of every
    class."""
    rest = sum(math.exp(o[k]) / expected[k] for k in negatives if k != t)
    return -math.log(math.exp(o[t]) / (math.exp(o[t]) + rest))


def clustered(
    kind: str,
    root: list[float],
    outputs: list[float],
    assignment: list[int],
    counts: list[float],
    **p: float,
) -> list[float]:
    """The probability of every class of a layer of clusters.

    root: the scores of the classes with the assignment −1, in their order, and then of every
    cluster. outputs: o_k of the classes in clusters; those of the others are not read.
    """
    classes, listed = range(len(assignment)), [k for k, c in enumerate(assignment) if c < 0]
    entry = {k: i for i, k in enumerate(listed)}
    used = [entry[k] for k in listed] + sorted({len(listed) + c for c in assignment if c >= 0})
    total = sum(math.exp(root[e]) for e in used)
    found = []
    for k in classes:
        c = assignment[k]
        if c < 0:
            found.append(math.exp(root[entry[k]]) / total)
            continue
        mates = [j for j in classes if assignment[j] == c]
        own = {j: counts[j] * numerator(kind, outputs[j], **p) for j in mates}
        found.append(math.exp(root[len(listed) + c]) / total * own[k] / sum(own.values()))
    return found
