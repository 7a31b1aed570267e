"""A call that a GPU repeats as one CUDA graph.

Where a call is some hundred short operations, launching them takes Python longer than the GPU takes
to run them, and the time of the call says little about the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from softsphere.graphs.cuda import Graph

__all__ = ["Capture", "captured_on_cuda"]

Call = Callable[[], Any]
# Makes of a call another one that has the same effects.
Capture = Callable[[Call], Call]
# Calls before the capture, so that whatever is made, compiled or tried out once is done.
_WARM_UP = 3


def captured_on_cuda(call: Call) -> Call:
    """Captures what a call launches, and returns what launches it again, on the same tensors.

    Raises RuntimeError if the call reads a value from the device, or memory does not suffice.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(_WARM_UP):
        Graph.warmed_up(call, device)
    graph = Graph(device)
    graph.record(call)
    return graph.replay
