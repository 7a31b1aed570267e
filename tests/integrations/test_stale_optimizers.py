"""An optimizer that was made before replace_lm_head tells that it does not train the head."""

from __future__ import annotations

import warnings

import pytest
import torch
from _causal_models import ASSIGNMENT, F64, V, batch, gpt2

from softsphere import ClusteredLoss
from softsphere.integrations.transformers import replace_lm_head

pytestmark = [
    pytest.mark.once("the models are made by transformers, and the heads have their own tests"),
    pytest.mark.filterwarnings("ignore"),
]


def own_head():
    torch.manual_seed(1)
    return ClusteredLoss(16, V, ASSIGNMENT, **F64)


def stepped(model, optimizer) -> int:
    """How many warnings two steps give."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**batch()).loss.backward()
            optimizer.step()
    return sum("was made before replace_lm_head" in str(x.message) for x in seen)


CASES = {
    "an older one, a weight of its own": (own_head, True, 1),
    "a newer one, a weight of its own": (own_head, False, 0),
    "an older one, the weight of the lm_head": (lambda: "taylor_softmax", True, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_that_does_not_train_the_head_warns(name):
    make, older, times = CASES[name]
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if older else None
    replace_lm_head(model, make())
    before = model.lm_head.weight.detach().clone()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    assert stepped(model, optimizer) == times
    assert torch.equal(model.lm_head.weight, before) == bool(times)
    again = torch.optim.SGD(model.parameters(), 0.1)
    assert stepped(model, again) == 0
