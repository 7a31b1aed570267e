"""Output layers of language models whose classes are sharded over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softsphere.heads import FactoredSphericalLoss, LinearSphericalLoss
from softsphere.optim import FactoredSGD
from softsphere_lab.models.output_layers import Output

__all__ = ["can_be_sharded", "sharded_layer"]


def can_be_sharded(output: Output) -> bool:
    """Returns whether the classes of an output layer can be sharded.

    Those of softmax and of the baselines cannot.
    """
    return output.engine in ("gram", "factored")


def sharded_layer(
    output: Output, whole: nn.Module, counts: Tensor, group: dist.ProcessGroup
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Returns a layer with the weights of `whole`, sharded over the group, and its own optimizer.

    It leaves the random generator as it was. whole, counts: what `layer` returned, and was given,
    for an output that can be sharded. The optimizer is None where `layer` returned None.
    """
    assert isinstance(whole, FactoredSphericalLoss | LinearSphericalLoss)
    more: dict[str, Any] = {
        "prior": counts if output.prior else None,
        "device": whole.weight.device,
        "dtype": whole.weight.dtype,
        "process_group": group,
    }
    if isinstance(whole, LinearSphericalLoss):
        more["options"] = whole.options
    with torch.random.fork_rng(devices=[]):
        head = type(whole)(whole.in_features, whole.num_classes, whole.loss, **more)
    head.load_state_dict(whole.state_dict())
    if output.rate is None:
        return head, None
    return head, FactoredSGD(head.parameters(), lr=output.rate * whole.num_classes)
