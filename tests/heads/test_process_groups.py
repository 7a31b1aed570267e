"""Wrappers for several processes: a factored layer is refused, and predictions say what to do."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from _subject import Subject
from softsphere import ClusteredLoss, LinearSphericalLoss, SampledSoftmaxLoss

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.once("gloo joins processes of the CPU"),
]


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/group")
    yield
    dist.destroy_process_group()


def data_parallel(s: Subject) -> None:
    DistributedDataParallel(s.model)


def data_parallel_later(s: Subject) -> None:
    if "init_sync" not in inspect.signature(DistributedDataParallel).parameters:
        pytest.skip("this version of PyTorch always sends the weights at construction")
    model = DistributedDataParallel(s.model, init_sync=False)
    model(*s.batch()).backward()


def fully_sharded(s: Subject) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this version of PyTorch has fully_shard elsewhere")
    # on a machine with a GPU it would take the GPU, whatever the model is on
    fsdp.fully_shard(s.model, mesh=init_device_mesh("cpu", (1,)))
    s.loss()


def distributed_tensor(s: Subject) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    distribute_tensor(s.head.weight, init_device_mesh("cpu", (1,)), [Shard(0)])


def gradient_reduced(s: Subject) -> None:
    s.loss().backward()
    dist.all_reduce(s.head.weight.grad)


def weight_sent(s: Subject) -> None:
    dist.broadcast(s.head.weight.data, 0)


WRAPPERS = (
    data_parallel,
    data_parallel_later,
    fully_sharded,
    distributed_tensor,
    gradient_reduced,
    weight_sent,
)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_is_refused(wrap):
    subject = Subject("factored")
    before = subject.W
    with pytest.raises(TypeError, match=r"sharded or reduced.*LinearSphericalLoss"):
        wrap(subject)
    assert torch.equal(subject.W, before)


PREDICTIONS = {
    "log_prob": lambda head, hidden: head.log_prob(hidden),
    "predict": lambda head, hidden: head.predict(hidden),
    "topk": lambda head, hidden: head.topk(hidden, 2).values,
    "rank": lambda head, hidden: head.rank(hidden, torch.zeros(3, dtype=torch.long)),
}


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("kind", ["linear", "sampled", "clustered"])
def test_a_prediction_of_a_fully_sharded_layer_says_how_to_gather_its_weight(kind, name):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard") or not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this version of PyTorch has no fully_shard on a CPU")
    head = {
        "linear": lambda: LinearSphericalLoss(4, 8),
        "sampled": lambda: SampledSoftmaxLoss(4, 8, 3),
        "clustered": lambda: ClusteredLoss(4, 8, torch.arange(8) % 3 - 1),
    }[kind]()
    predict, hidden = PREDICTIONS[name], torch.randn(3, 4)
    want = predict(head, hidden).detach()
    fsdp.fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
    head(hidden, torch.arange(3)).backward()
    with pytest.raises(RuntimeError, match=r"weight is sharded by fully_shard.*unshard\(\)"):
        predict(head, hidden)
    head.unshard()
    assert torch.equal(predict(head, hidden), want)
