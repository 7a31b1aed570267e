"""Clusters of items."""

from __future__ import annotations

import torch

from softsphere.clusters import Clusters, by_frequency, by_neighbours
from softsphere_lab.data.interactions import Interactions
from softsphere_lab.models.output_layers import Output

__all__ = ["BY", "item_clusters"]

# What the items of a cluster have in common, unless an output names it.
BY = "co-visits"


def item_clusters(data: Interactions, output: Output) -> Clusters:
    """Returns clusters of items with the same users, who are the contexts of an item."""
    C, S = output.clusters, output.shortlist
    if output.by == "frequency":
        return by_frequency(data.counts, num_clusters=C, shortlist=S)
    users = torch.repeat_interleave(data.train.lengths)
    return by_neighbours(
        torch.stack([data.train.items, users], 1),
        data.counts,
        num_clusters=C,
        shortlist=S,
        contexts=len(data.train.lengths),
    )
