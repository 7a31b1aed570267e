"""What an error says of a value that came in place of a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softsphere import LinearSphericalLoss

CALLS = {
    "hidden": lambda value: LinearSphericalLoss(4, 8)(value, torch.arange(2)),
    "target": lambda value: LinearSphericalLoss(4, 8)(torch.randn(2, 4), value),
    "prior": lambda value: LinearSphericalLoss(4, 8, prior=value),
    "weight": lambda value: LinearSphericalLoss(4, 8, weight=value),
}
VALUES = {
    "a list of length 100000": [1] * 100_000,
    "a ndarray of length 100000": np.ones(100_000),
    "a ndarray; use": np.array(1.0),
}


@pytest.mark.parametrize("came", VALUES)
@pytest.mark.parametrize("name", CALLS)
def test_a_list_is_described_and_not_printed(name, came):
    with pytest.raises(TypeError, match=rf"^{name} must be a .*got {came}.*torch\.as_tensor") as e:
        CALLS[name](VALUES[came])
    assert len(str(e.value)) < 200
