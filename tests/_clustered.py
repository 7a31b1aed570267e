"""Clustered layers, and their probabilities by the explicit definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import _oracle
from softsphere import ClusteredLoss

d, D = 5, 40

# Every shape of an assignment: a name, and the cluster of each class.
generator = torch.Generator().manual_seed(3)
MIXED = torch.randint(-1, 6, (D,), generator=generator)
ASSIGNMENTS: dict[str, Tensor] = {
    "mixed": MIXED,
    "empty clusters": torch.where(MIXED == 2, 7, torch.where(MIXED == 0, 4, MIXED)),
    "clusters of one": torch.arange(D).roll(7) - 10,
    "one cluster": MIXED.clamp_max(0),
    "no shortlist": MIXED.clamp_min(0),
    "all shortlist": torch.full((D,), -1),
    "one class of the shortlist": torch.arange(D).sub(1).clamp_max(3),
}
ASSIGNMENTS["clusters of one"][:10] = -1
ASSIGNMENTS["clusters of one"] = ASSIGNMENTS["clusters of one"].clamp_min(-1)

# Every leaf: the argument of the layer, and what the oracle calls it.
LEAVES: dict[str, tuple[Any, str, dict[str, float]]] = {
    "taylor_softmax": ("taylor_softmax", "taylor", {"order": 2}),
    "spherical_softmax": ("spherical_softmax", "spherical", {"eps": 1.0}),
    "softmax": ("softmax", "softmax", {}),
    "higher_taylor_softmax": ("higher_taylor_softmax", "taylor", {"order": 4}),
    # its margin is for training alone
    "soft_margin_softmax": ("soft_margin_softmax", "softmax", {}),
}
COUNTS = torch.randint(1, 50, (D,), generator=generator)


def layer(assignment: Tensor, leaf: str = "taylor_softmax", **options: Any) -> ClusteredLoss:
    torch.manual_seed(0)
    options = {"counts": COUNTS, "dtype": torch.float64, **options}
    head = ClusteredLoss(d, len(assignment), assignment, leaf=LEAVES[leaf][0], **options)
    # not through the parameters, since those of factored leaves are other ones
    state = head.state_dict()
    moved = {
        name: state[name] + 0.5 * torch.randn_like(state[name])
        for name in ("weight", "bias", "root.weight", "root.bias", "project.weight")
        if name in state
    }
    head.load_state_dict({**state, **moved})
    return head


def rows(m: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)


def probabilities(head: ClusteredLoss, leaf: str, hidden: Tensor) -> Tensor:
    """(m, D), by the oracle, from the parameters as numbers."""
    assignment = head.assignment.tolist()
    leaves = [k for _, k in sorted((c, k) for k, c in enumerate(assignment) if c >= 0)]
    counts = COUNTS.tolist() if len(assignment) == D else [1.0] * len(assignment)
    _, kind, numbers = LEAVES[leaf]
    found = []
    W, b = head.state_dict()["weight"], head.state_dict().get("bias")
    with torch.no_grad():
        for h in hidden:
            root = head.root.weight @ h
            root = root if head.root.bias is None else root + head.root.bias
            z = h if head.project is None else head.project.weight @ h
            o = W @ z if b is None else W @ z + b
            outputs = torch.zeros(len(assignment), dtype=torch.float64)
            outputs[leaves] = o
            given = root.tolist(), outputs.tolist(), assignment, counts
            found.append(_oracle.clustered(kind, *given, **numbers))
    return torch.tensor(found, dtype=torch.float64)
