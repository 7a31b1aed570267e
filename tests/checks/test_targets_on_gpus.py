"""A device whose values Python does not look at asserts by itself that targets are classes."""

from __future__ import annotations

import pytest
import torch

from _recorded_graph import pretend_a_gpu
from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
    SphericalLoss,
    functional,
)

d, D = 8, 50
HIDDEN = torch.ones(4, d)
HEADS = {
    engine: lambda engine=engine: LinearSphericalLoss(
        d, D, bias=False, options=LinearSphericalOptions(engine=engine)
    )
    for engine in ("gram", "chunked", "dense")
} | {
    "factored": lambda: FactoredSphericalLoss(d, D),
    "clustered": lambda: ClusteredLoss(d, D, torch.arange(D) % 4 - 1),
    "sampled": lambda: SampledSoftmaxLoss(d, D, num_samples=5),
}
pytestmark = pytest.mark.once("a CPU stands in for a GPU")


@pytest.mark.parametrize("target", [-7, -1, D, 10**6])
@pytest.mark.parametrize("name", HEADS)
def test_a_target_that_is_no_class_is_asserted(name, target, monkeypatch):
    head = HEADS[name]()
    pretend_a_gpu(monkeypatch)
    targets = torch.tensor([3, target, -100, 0])
    with pytest.raises(RuntimeError, match=rf"target must be in \[0, {D}\) or ignore_index"):
        head(HIDDEN, targets)
    with pytest.raises(RuntimeError, match=rf"target must be in \[0, {D}\)"):
        head.rank(HIDDEN, targets)
    assert head(HIDDEN, torch.where(targets == target, 0, targets)).isfinite()


@pytest.mark.parametrize("target", [-7, -1, D])
def test_so_it_is_for_logits_and_targets_with_values(target, monkeypatch):
    pretend_a_gpu(monkeypatch)
    with pytest.raises(RuntimeError, match=rf"target must be in \[0, {D}\)"):
        SphericalLoss("taylor_softmax")(torch.ones(1, D), torch.tensor([target]))
    head, targets = LinearSphericalLoss(d, D), torch.tensor([[3, target]]).expand(4, -1)
    if target == -1:  # padding
        assert head(HIDDEN, targets, torch.ones(4, 2)).isfinite()
        return
    with pytest.raises(RuntimeError, match=rf"target must be in \[0, {D}\) or -1 for padding"):
        head(HIDDEN, targets, torch.ones(4, 2))


@pytest.mark.parametrize("call", ["on_linear", "on_logits", "log_prob"])
def test_a_prior_of_the_functional_interface_is_not_waited_for(call, monkeypatch):
    """So that a CUDA graph can hold it."""
    pretend_a_gpu(monkeypatch)
    W, target = torch.randn(D, d), torch.tensor([0, 1, 2, 3])
    given = {"loss": "taylor_softmax", "prior": torch.arange(1.0, D + 1)}
    calls = {
        "on_linear": lambda: functional.linear_spherical_loss(HIDDEN, W, target, **given),
        "on_logits": lambda: functional.spherical_loss(HIDDEN @ W.mT, target, **given),
        "log_prob": lambda: functional.log_prob(HIDDEN @ W.mT, **given),
    }
    want = calls[call]()

    def waited_for(*_):
        raise AssertionError("a GPU is waited for")

    for reads in ("__bool__", "__float__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, reads, waited_for)
    found = calls[call]()
    monkeypatch.undo()
    torch.testing.assert_close(found, want)
