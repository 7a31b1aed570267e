"""The memory of a loss and its gradient, by counting the tensors that exist at once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from softsphere import losses
from softsphere.functional import spherical_loss


class Bytes(TorchDispatchMode):
    """The most bytes of the tensors that were made meanwhile and existed at once."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_iter(result) if isinstance(x, Tensor)]
        alive = [x for x in (ref() for ref in self.made) if x is not None]
        self.made = [weakref.ref(x) for x in alive]
        stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
        self.most = max(self.most, sum(n for at, n in stores.items() if at not in self.known))
        return result


def most_bytes(loss: losses.Loss, logits: Tensor, target: Tensor, **options: Any) -> float:
    """The memory of a loss and its gradient, in sizes of the logits."""
    logits = logits.detach().requires_grad_()
    with Bytes(logits, target) as meter:
        spherical_loss(logits, target, loss, **options).backward()
    assert logits.grad is not None
    return meter.most / logits.untyped_storage().nbytes()
