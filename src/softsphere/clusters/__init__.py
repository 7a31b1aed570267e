"""Assignments of classes to a shortlist and clusters, for a clustered output layer.

`by_frequency` needs the counts of the classes alone. `by_vectors` puts classes with similar vectors
into one cluster, and `by_neighbours` makes such vectors from a text, or from pairs of things that
occur together. Clusters by meaning are much better than clusters by frequency.

`by_vectors` and `by_neighbours` need scikit-learn and SciPy, which
``pip install scikit-learn scipy`` installs.
"""

from softsphere.clusters.assignment import Clusters
from softsphere.clusters.by_counts import by_frequency
from softsphere.clusters.by_meaning import by_neighbours, by_vectors
from softsphere.clusters.cost_model import Sizes, default_sizes

__all__ = ["Clusters", "Sizes", "by_frequency", "by_neighbours", "by_vectors", "default_sizes"]
