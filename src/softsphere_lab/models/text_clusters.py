"""Clusters of the words of a text."""

from __future__ import annotations

from torch import Tensor

from softsphere.clusters import Clusters, by_frequency, by_neighbours, by_vectors
from softsphere_lab.data.text import Text
from softsphere_lab.models.output_layers import Output

__all__ = ["BY", "WordClusters"]

# What the words of a cluster have in common, unless an output names it.
BY = "meaning"
# Words that occur less often are rare, as by default in `by_neighbours`.
RARE = 5


class WordClusters:
    """Makes clusters from the words that are trained on, for one output layer after another."""

    def __init__(self, text: Text) -> None:
        self.text = text
        # of the words, once there are any
        self.vectors: Tensor | None = None

    def __call__(self, output: Output) -> Clusters:
        text, C, S = self.text, output.clusters, output.shortlist
        if output.by == "frequency":
            return by_frequency(text.counts, num_clusters=C, shortlist=S)
        if self.vectors is None:
            made = by_neighbours(
                text.train, text.counts, num_clusters=C, shortlist=S, min_count=RARE
            )
            self.vectors = made.vectors
            return made
        return by_vectors(self.vectors, text.counts, num_clusters=C, shortlist=S, min_count=RARE)
