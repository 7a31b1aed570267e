"""Cases of a linear layer whose weight is a DTensor, as tensor parallelism makes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from _ranks import TIGHT, Adam, rows_of
from _sharded_linear import COUNTS, Model, d, on_one, raises, step_both
from softsphere import LinearSphericalLoss
from softsphere.parallel import clip_grad_norm_, keep_whole_state

D = 23


def linear():
    torch.manual_seed(3)
    return nn.Linear(d, D, dtype=torch.float64)


def mesh_of(size):
    return init_device_mesh("cpu", (size,))


def pair(size, replicated=False, **given):
    """One layer with all classes, and one made from a layer that PyTorch has sharded."""
    one = LinearSphericalLoss.from_linear(linear(), **given)
    sharded = parallelize_module(linear(), mesh_of(size), ColwiseParallel())
    many = LinearSphericalLoss.from_linear(
        sharded, **given, replicated=replicated, averaged=None if replicated else False
    )
    assert many.weight is sharded.weight
    return one, many


def same_weights(one, many):
    for name in ("weight", "bias"):
        x, want = getattr(many, name), getattr(one, name)
        torch.testing.assert_close(x.full_tensor().detach(), want.detach(), **TIGHT)


def train(rank, size, folder, make=Adam, replicated=False, sparse=False, **given):
    heads = pair(size, replicated, **given)
    optimizers = [make(head.parameters(), lr=0.1) for head in heads]
    for _ in range(3):
        step_both(rank, heads, optimizers, replicated, sparse, COUNTS[:size])
        same_weights(*heads)


def clipped(rank, size, folder, clip=nn.utils.clip_grad_norm_):
    """A DTensor has the norm of all its rows, for PyTorch and for softsphere."""
    one, many = pair(size)
    m, own = sum(COUNTS[:size]), rows_of(rank, COUNTS[:size])
    H, t = torch.randn(m, d).double(), torch.randint(D, (m,))
    one(H, t).backward()
    many(H[own], t[own]).backward()
    want = nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    norm = clip(many, 0.1) if clip is clip_grad_norm_ else clip(many.parameters(), 0.1)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    torch.testing.assert_close(norm.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(many.weight.grad.full_tensor(), one.weight.grad, rtol=1e-5, atol=0)


def predicted(rank, size, folder):
    one, many = pair(size, prior=torch.arange(1.0, D + 1).double())
    rows = rows_of(rank, COUNTS[:size])
    H = torch.randn(sum(COUNTS[:size]), d).double()
    with torch.no_grad():
        assert torch.equal(many.topk(H[rows], 3).indices, one.topk(H, 3).indices[rows])
        torch.testing.assert_close(many.log_prob(H[rows]), one.log_prob(H)[rows], **TIGHT)


def saved(rank, size, folder):
    """The state is that of PyTorch's own layer; a whole one loads as well."""
    one, many = pair(size)
    optimizer = Adam(many.parameters())
    keep_whole_state(optimizer, many)
    many(torch.randn(2, d).double(), torch.arange(2)).backward()
    optimizer.step()
    kept = {"head": many.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    dcp.save(kept, checkpoint_id=Path(folder) / "dtensors")
    other = pair(size)[1]
    state = {"head": other.state_dict()}
    dcp.load(state, checkpoint_id=Path(folder) / "dtensors")
    other.load_state_dict(state["head"])
    assert torch.equal(other.weight.full_tensor(), many.weight.full_tensor())
    other.load_state_dict(one.state_dict())
    same_weights(one, other)
    plain = LinearSphericalLoss(d, D, process_group=mesh_of(size), dtype=torch.float64)
    plain.load_state_dict(other.state_dict())
    torch.testing.assert_close(plain.weight, other.weight.to_local(), rtol=0, atol=0)


def drawn_again(rank, size, folder):
    many = pair(size)[1]
    before = many.weight.full_tensor().clone()
    many.reset_parameters()
    W = many.weight.full_tensor()
    assert not (before == W).any()
    assert 0 < W.abs().max() <= d**-0.5 and len(W.unique()) == W.numel()


def below_both(rank, size, folder):
    """Tensor parallelism for the head, over which the whole model is sharded by FSDP2."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        return  # this torch shards on no CPU
    from torch.distributed.fsdp import fully_shard

    tp = 2 if size % 2 == 0 else size
    mesh = init_device_mesh("cpu", (size // tp, tp), mesh_dim_names=("dp", "tp"))
    one = Model(LinearSphericalLoss.from_linear(linear()))
    out = parallelize_module(linear(), mesh["tp"], ColwiseParallel())
    many = Model(LinearSphericalLoss.from_linear(out, replicated=True))
    fully_shard(many, mesh=mesh["dp"])
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.5, foreach=False) for model in (one, many)
    ]
    counts = (2,) * (size // tp)
    for _ in range(3):
        x, t = torch.randn(sum(counts), d).double(), torch.randint(D, (sum(counts),))
        own = rows_of(mesh["dp"].get_local_rank(), counts)
        for optimizer, loss in zip(optimizers, (one(x, t), many(x[own], t[own])), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    same_weights(one.head, many.head)
    trunk = many.trunk.weight.full_tensor()
    torch.testing.assert_close(trunk, one.trunk.weight, **TIGHT)


RIGHT = {
    "Adam": train,
    "momentum": partial(train, make=partial(torch.optim.SGD, momentum=0.9)),
    "replicated": partial(train, replicated=True, prior=torch.arange(1.0, D + 1).double()),
    "centred, K-sparse": partial(train, loss="bohning_bound", sparse=True),
    "class weights": partial(train, weight=torch.linspace(0.5, 2, D).double()),
    "clipped": clipped,
    "clipped with others": partial(clipped, clip=clip_grad_norm_),
    "predict": predicted,
    "saved": saved,
    "drawn again": drawn_again,
    "fully sharded": below_both,
}
LONG: dict[str, object] = {}


def placed(size, weight, bias=None):
    layer, mesh = linear(), mesh_of(size)
    for name, where in (("weight", weight), ("bias", bias or weight)):
        x = distribute_tensor(getattr(layer, name).detach(), mesh, [where])
        setattr(layer, name, nn.Parameter(x))
    return layer


def other_placements(rank, size, folder):
    make = partial(LinearSphericalLoss.from_linear, replicated=True)
    for layer in (placed(size, Replicate()), placed(size, Shard(1), Replicate())):
        raises(ValueError, "weight of linear must be sharded by its rows", partial(make, layer))
    layer = placed(size, Shard(0), Replicate())
    raises(ValueError, "bias of linear must be sharded by its rows", partial(make, layer))


def unsaid(rank, size, folder):
    make = LinearSphericalLoss.from_linear
    raises(ValueError, "replicated must be given", partial(make, placed(size, Shard(0))))
    raises(ValueError, "process_group alone", partial(make, linear(), replicated=True))
    head = make(placed(size, Shard(0)), replicated=False)
    H = torch.randn(2, d, requires_grad=True).double()
    raises(ValueError, "averaged=True", lambda: head(H * 2, torch.arange(2)))


def mixed(rank, size, folder):
    """DTensors and ordinary tensors in one call."""
    t, mesh = torch.arange(2), mesh_of(size)
    H = torch.randn(2, d).double()
    sharded, whole = pair(size)[1], LinearSphericalLoss.from_linear(linear())
    given = distribute_tensor(H, mesh, [Replicate()])
    raises(TypeError, "must be ordinary tensors", lambda: sharded(given, t))
    raises(TypeError, "must be ordinary tensors", lambda: sharded.predict(given))
    other = distribute_tensor(t, mesh, [Replicate()])
    raises(TypeError, "must be ordinary tensors", lambda: sharded(H, other))
    raises(
        TypeError, "weight is an ordinary tensor, but hidden is a DTensor", lambda: whole(given, t)
    )
    layer = placed(size, Shard(0))
    whole.weight, whole.bias = layer.weight, layer.bias
    raises(TypeError, "from_linear", lambda: whole(H, t))


def other_mesh(rank, size, folder):
    """A weight that was sharded over other ranks after the layer was made."""
    many = pair(size)[1]
    from torch.distributed.device_mesh import DeviceMesh

    reverse = DeviceMesh("cpu", list(range(size))[::-1])
    for name, x in linear().named_parameters():
        setattr(many, name, nn.Parameter(distribute_tensor(x.detach(), reverse, [Shard(0)])))
    words = "in the order of their process group"
    H, t = torch.randn(2, d).double(), torch.arange(2)
    # the place of the rank in the middle is the same
    raises((ValueError, RuntimeError), words, lambda: many(H, t))


def accumulating(rank, size, folder):
    many = pair(size)[1]

    def accumulate():
        with many.accumulate():
            pass

    raises((TypeError, RuntimeError), "plain tensor", accumulate)


def skipped_step(rank, size, folder):
    """An optimizer that steps on some ranks alone."""
    many = pair(size)[1]
    H, t = torch.randn(2, d).double(), torch.arange(2)
    many(H, t).backward()
    if rank:
        with torch.no_grad():
            many.weight.to_local().add_(1)
    raises((RuntimeError, ValueError), "changed on some ranks", lambda: many(H, t))


def replicated_on_one(rank, size, folder):
    """Only one rank says that the rows are replicated."""
    layer = placed(size, Shard(0))
    make = partial(LinearSphericalLoss.from_linear, layer, replicated=None if rank == 0 else True)
    words = "replicated must be given"
    on_one(rank, (ValueError, words), (RuntimeError, f"rank 0 of.*{words}"), make)


REFUSED = {
    case.__name__: case
    for case in (
        other_placements,
        unsaid,
        mixed,
        other_mesh,
        accumulating,
        skipped_step,
        replicated_on_one,
    )
}
