"""The batch that heads are measured on has the probabilities of a trained model."""

from __future__ import annotations

import pytest
import torch

from softsphere_lab.timing.after_training import trained_batch
from softsphere_lab.timing.setting import Setting

# What cut cross-entropy takes for nothing in bfloat16.
FILTERED = 2**-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("D", "d"), [(1000, 16), (1000, 64), (50_000, 16), (50_000, 64)])
def test_the_target_has_much_of_the_mass_and_tens_of_others_are_seen(D, d, dtype):
    torch.manual_seed(0)
    hidden, weight, target = trained_batch(Setting(D=D, d=d, m=256), "cpu", dtype)
    assert hidden.dtype == weight.dtype == dtype
    assert hidden.requires_grad and weight.requires_grad
    with torch.no_grad():
        p = (hidden.float() @ weight.float().mT).softmax(1)
    of_target = p.gather(1, target[:, None])
    assert 0.4 < of_target.mean() < 0.6
    # not a mean of rows that have all of it with rows that have nothing
    assert of_target.quantile(0.1) > 0.1 and of_target.quantile(0.9) < 0.9
    others = p.scatter(1, target[:, None], 0)
    assert others.topk(40, dim=1).values.sum(1).mean() > 0.1
    assert (others > FILTERED).sum(1).float().mean() > 20
    assert (others < FILTERED).float().mean() > 0.6  # and most are not
