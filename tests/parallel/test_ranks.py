"""What the ranks of a process group know of it."""

from __future__ import annotations

import pytest
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
