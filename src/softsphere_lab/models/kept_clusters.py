"""The clusters of output layers, made once for a record and kept in its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from softsphere.clusters import Clusters
from softsphere_lab.models.output_layers import Output

__all__ = ["Assignments", "assignment_name", "kept_assignments"]

# The folder of a record with its clusters.
FOLDER = "clusters"
# The cluster of each class, by the name of its file.
Assignments = dict[str, Tensor]


def assignment_name(output: Output, by: str) -> str:
    """Returns the name of the clusters that an output layer has.

    by: what classes of a cluster have in common, unless the output names it.

    >>> assignment_name(Output("taylor_softmax", clusters=16), "meaning")
    'meaning-16'
    >>> assignment_name(Output("softmax", clusters=16, shortlist=100, by="frequency"), "meaning")
    'frequency-16-shortlist-100'
    """
    shortlist = "" if output.shortlist is None else f"-shortlist-{output.shortlist}"
    return f"{output.by or by}-{output.clusters}{shortlist}"


def kept_assignments(
    outputs: Iterable[Output], folder: Path, by: str, make: Callable[[Output], Clusters]
) -> Assignments:
    """Returns the cluster of each class, −1 for the shortlist, for every layer with clusters.

    What the folder of the record does not have is made and kept there, so that runs that are
    resumed have the same clusters.
    """
    found: Assignments = {}
    for output in outputs:
        if output.clusters is None:
            continue
        name = assignment_name(output, by)
        path = folder / FOLDER / f"{name}.pt"
        if not path.exists():
            made = make(output)
            path.parent.mkdir(exist_ok=True)
            made.save(path, vectors=False)
        found[name] = Clusters.load(path).assignment
    return found
