"""What DistributedDataParallel and fully_shard do with layers whose weight fits on each device."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from _ranks import TIGHT, Adam, rows_of
from _sharded_linear import Model, d, raises
from softsphere import (
    ClusteredLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
)

D = 23
CLUSTERS = torch.arange(D) % 5 - 1


def linear(**given):
    return LinearSphericalLoss(d, D, **given)


def clustered(**given):
    return ClusteredLoss(d, D, CLUSTERS, **given)


# All classes are negatives, so that all ranks and one process draw the same.
LAYERS = {
    **{
        f"linear, {engine}": partial(linear, options=LinearSphericalOptions(engine=engine))
        for engine in ("auto", "dense", "chunked", "gram")
    },
    "linear, prior": partial(linear, prior=torch.arange(1.0, D + 1)),
    "linear, softmax": partial(linear, loss="softmax"),
    **{
        f"clustered, {engine}": partial(clustered, engine=engine)
        for engine in ("auto", "logits", "gram")
    },
    "clustered, softmax": partial(clustered, leaf="softmax", counts=torch.arange(1.0, D + 1)),
    "clustered, leaf_features": partial(clustered, leaf_features=2),
    "sampled": partial(SampledSoftmaxLoss, d, D, D),
}


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(rank, size, folder, make, wrap):
    """Three steps of a wrapped model on the rows of each rank, beside those of one process."""
    models = [Model(make(dtype=torch.float64))]
    models.append(copy.deepcopy(models[0]))
    wrapped = wrap(models[1])
    optimizers = [Adam(model.parameters(), lr=0.1) for model in models]
    own = rows_of(rank, (3,) * size)
    for step in range(3):
        x, t = torch.randn(3 * size, d).double(), torch.randint(D, (3 * size,))
        if step == 1:
            t[:3] = torch.tensor([0, 5, 10])  # of the shortlist, so that rank 0 reads no leaf
        for optimizer, loss in zip(
            optimizers, (models[0](x, t), wrapped(x[own], t[own])), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, one), many in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(
            full(many), one, **TIGHT, msg=lambda m, name=name: f"{name}: {m}"
        )
    x, t = torch.randn(4, d).double(), torch.arange(4)
    whole, head = models[0].head, models[1].head
    if isinstance(head.weight, DTensor):
        raises(RuntimeError, "call head.unshard", lambda: head.log_prob(x))
        head.unshard()
    for predict in (lambda head: head.log_prob(x), lambda head: head.rank(x, t)):
        torch.testing.assert_close(predict(head), predict(whole), **TIGHT)


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.head)
    return fully_shard(model)


WRAPPERS = {"DDP": DistributedDataParallel}
if hasattr(torch.cpu.Stream, "record_event"):  # other versions of torch shard on no CPU
    WRAPPERS["fully_shard"] = fully_sharded

RIGHT = {
    f"{wrapper}, {layer}": partial(trained, make=make, wrap=wrap)
    for wrapper, wrap in WRAPPERS.items()
    for layer, make in LAYERS.items()
}
LONG: dict[str, object] = {}
REFUSED: dict[str, object] = {}
