"""Which engine computes the leaves of a clustered layer for which sizes, and why."""

from __future__ import annotations

from softsphere import checks
from softsphere.engines.choice import Choice
from softsphere.engines.grouped_gram import places

__all__ = ["LEAF_ENGINES", "choose_leaves", "leaf_costs"]

# The engines of the leaves by name. "factored" keeps another weight, so that it is chosen when the
# layer is made, and never by "auto".
LEAF_ENGINES = ("logits", "gram", "factored")

# A pair's output passes through memory several times; see `engine.Workload`.
_FLOPS_PER_OUTPUT = 200
# Products of single pairs take as long as this many times their FLOPs in a matrix product.
_SLOWNESS_OF_PAIRS = 4
# What the Gram matrices pay for each number of theirs and of the weight besides their products: the
# mean row is taken off, blocks are copied and summed, and all of it is differentiated.
_FLOPS_PER_NUMBER = 120
# A row of a factored cluster reads and writes the float64 matrices of that cluster, seldom for more
# than one row. It was measured to take as long as the outputs of some 8 w classes.
_FACTORED_ROW = 200


def leaf_costs(
    rows: int, pairs: int, clusters: int, places: tuple[float, float], width: int
) -> dict[str, float]:
    """The cost of the leaves in a step, forward and backward, by engine, in FLOP equivalents.

    Args:
        rows: n, the rows whose target is in a cluster.
        pairs: P = Σ_i n_c(i), the outputs that they need.
        clusters: U, the clusters that have rows.
        places: of their leaves in blocks, and of the rows in tiles; see `grouped_gram`.
        width: w, the width of their weight with the bias.
    """
    numbers = places[0] * width + clusters * width * width
    return {
        "logits": pairs * (6.0 * width * _SLOWNESS_OF_PAIRS + _FLOPS_PER_OUTPUT),
        "gram": 6.0 * sum(places) * width * width + _FLOPS_PER_NUMBER * numbers,
        "factored": float(_FACTORED_ROW * rows * width * width),
    }


def choose_leaves(
    rows: int, num_classes: int, num_clusters: int, in_features: int, *, bias: bool = True
) -> Choice:
    """Returns the engine that `ClusteredLoss` takes for its leaves with these sizes, and why.

    Only rows whose target is in a cluster have a cost here. A row of them needs the n = L / C
    classes of its cluster, if the L classes are shared evenly by C clusters:

        logits      n outputs: 24 n w FLOPs, and the passes over them
        gram        6 w², and for each cluster with rows a Gram matrix of w² numbers, which is made
                    with 6 n w² FLOPs and passed over; spherical leaves
        factored    200 w², which is 17 w² FLOPs and the passes over the float64 matrices of one
                    cluster; spherical leaves, a weight of its own kind, stepped by SGD alone

    with w = in_features, and one more with a bias. "auto" takes the cheaper one of the first two.
    The factored engine must be asked for when the layer is made. It pays once a cluster has more
    than about 8 w classes, and by the more, the larger they are.

    Args:
        rows: the number of rows whose target is in a cluster.
        num_classes: L, the classes in clusters.
        num_clusters: C.
        in_features: the width of the weight of the leaves.
        bias: whether they have a bias.

    Raises TypeError or ValueError for a size that cannot be.

    >>> choose_leaves(200, 72_000, 256, 128).engine
    'logits'
    >>> choose_leaves(100_000, 72_000, 16, 128).engine
    'gram'
    """
    checks.sizes(
        rows=rows, num_classes=num_classes, num_clusters=num_clusters, in_features=in_features
    )
    pairs = rows * num_classes // max(1, num_clusters)
    clusters = min(rows, num_clusters)
    leaves = num_classes * clusters // max(1, num_clusters)
    largest, most_rows = (-(-total // max(1, clusters)) for total in (leaves, rows))
    cut = places(clusters, leaves, largest, rows, most_rows)
    costs = leaf_costs(rows, pairs, clusters, cut, in_features + int(bias))
    engine = "logits" if costs["logits"] <= costs["gram"] else "gram"
    listed = ", ".join(f"{name} {cost:.2g}" for name, cost in costs.items())
    hint = (
        "; with SGD, engine='factored' costs least" if min(costs.values()) < costs[engine] else ""
    )
    return Choice(
        engine,
        f"{engine} is the cheapest for any optimizer; estimated costs in FLOP equivalents: "
        f"{listed}{hint}",
    )
