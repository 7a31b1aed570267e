"""What the ranks of a process group know of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from softsphere.parallel import Ranks

pytestmark = pytest.mark.once("a process group names its devices itself")


@pytest.mark.parametrize(
    ("config", "device"),
    {
        "cuda:nccl": "cuda",
        "cpu:gloo,cuda:nccl": "cpu",
        "cpu:gloo,cuda:gloo,mps:gloo": "cpu",
    }.items(),
)
def test_small_messages_are_where_a_group_can_send_them(config, device, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    ranks = object.__new__(Ranks)
    ranks.group = None
    assert ranks.device.type == device


def test_small_messages_are_on_the_gpu_that_the_group_was_given(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    ranks = object.__new__(Ranks)
    ranks.group = SimpleNamespace(bound_device_id=torch.device("cuda", 3))
    assert ranks.device == torch.device("cuda", 3)


def test_a_tensor_where_the_group_has_no_backend_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    ranks = object.__new__(Ranks)
    ranks.group = None
    with pytest.raises(ValueError, match=r"on cpu, got 'cuda:nccl'; move .* to cuda, or call"):
        ranks.check_device(torch.ones(1, device="cpu"))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    ranks.check_device(torch.ones(1, device="cpu"))
