"""The clusters of the words of a text, made once for a record and kept in its folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from softsphere.clusters import Clusters, by_frequency, by_neighbours, by_vectors
from softsphere_lab.data.text import Text
from softsphere_lab.models.output_layers import Output

__all__ = ["Assignments", "assignment_name", "kept_assignments"]

# The folder of a record with its clusters.
FOLDER = "clusters"
# Words that occur less often are rare, as by default in `by_neighbours`.
RARE = 5
# The cluster of each word, by the name of its file.
Assignments = dict[str, Tensor]


def assignment_name(output: Output) -> str:
    """Returns the name of the clusters that an output layer has.

    >>> assignment_name(Output("taylor_softmax", clusters=16, shortlist=100, by="frequency"))
    'frequency-16-shortlist-100'
    """
    shortlist = "" if output.shortlist is None else f"-shortlist-{output.shortlist}"
    return f"{output.by or 'meaning'}-{output.clusters}{shortlist}"


def kept_assignments(outputs: Iterable[Output], text: Text, folder: Path) -> Assignments:
    """Returns the cluster of each word, −1 for the shortlist, for every output layer with clusters.

    What the folder of the record does not have is made from the words that are trained on, and kept
    there, so that runs that are resumed have the same clusters.
    """
    found: Assignments = {}
    vectors: Tensor | None = None
    for output in outputs:
        if output.clusters is None:
            continue
        path = folder / FOLDER / f"{assignment_name(output)}.pt"
        if not path.exists():
            made, vectors = _made(output, text, vectors)
            path.parent.mkdir(exist_ok=True)
            made.save(path, vectors=False)
        found[assignment_name(output)] = Clusters.load(path).assignment
    return found


def _made(output: Output, text: Text, vectors: Tensor | None) -> tuple[Clusters, Tensor | None]:
    """Returns clusters, and the vectors of the words once there are any."""
    C, S = output.clusters, output.shortlist
    if output.by == "frequency":
        return by_frequency(text.counts, num_clusters=C, shortlist=S), vectors
    if vectors is None:
        made = by_neighbours(text.train, text.counts, num_clusters=C, shortlist=S, min_count=RARE)
        return made, made.vectors
    made = by_vectors(vectors, text.counts, num_clusters=C, shortlist=S, min_count=RARE)
    return made, vectors
