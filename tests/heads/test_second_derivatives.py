"""Second derivatives of output layers are those of log_prob, or they are refused.

`torch.autograd.grad` cuts what is not asked for out of the graph, an error with it, so that a part
without second derivatives would be taken for a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
)
from softsphere.engines.options import LinearSphericalOptions

D, d, M = 30, 4, 9
ASSIGNMENT = torch.arange(D) % 5 - 1
TARGET = torch.randint(D, (M,), generator=torch.Generator().manual_seed(3))


def linear(engine: str, loss: str = "taylor_softmax") -> nn.Module:
    options = LinearSphericalOptions(engine=engine)
    return LinearSphericalLoss(d, D, loss=loss, options=options)


def clustered(**options: object) -> nn.Module:
    return ClusteredLoss(
        d, D, ASSIGNMENT, counts=torch.arange(1, D + 1), dtype=torch.float64, **options
    )


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "linear, dense": lambda: linear("dense"),
    "linear, softmax": lambda: linear("auto", "softmax"),
    "sampled": lambda: SampledSoftmaxLoss(d, D, num_samples=D),
    "clusters": clustered,
    "clusters, logits": lambda: clustered(engine="logits"),
    "clusters, logits, softmax": lambda: clustered(engine="logits", leaf="softmax"),
    "clusters, gram": lambda: clustered(engine="gram"),
    "clusters, projected": lambda: clustered(leaf_features=3),
    "clusters without bias": lambda: clustered(bias=False),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "linear, gram": lambda: linear("gram"),
    "factored": lambda: FactoredSphericalLoss(d, D),
    "clusters, factored": lambda: clustered(engine="factored"),
    "clusters, sparse": lambda: clustered(sparse=True, engine="logits"),
}


def slopes_of_a_penalty(head: nn.Module, loss: Callable[[Tensor], Tensor], by: str) -> list[Tensor]:
    """The gradient of |∂loss/∂x|² with respect to hidden and all weights, x being one kind."""
    hidden = torch.randn(M, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_()
    weights = [*head.parameters()]
    first = torch.autograd.grad(
        loss(hidden), [hidden] if by == "hidden" else weights, create_graph=True
    )
    penalty = sum(slope.square().sum() for slope in first)
    return [*torch.autograd.grad(penalty, [hidden, *weights])]


@pytest.mark.parametrize("by", ["hidden", "weights"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_gradient_penalty_has_the_slopes_of_log_prob(name, by):
    head = RIGHT[name]().double().eval()
    got = slopes_of_a_penalty(head, lambda hidden: head(hidden, TARGET), by)
    want = slopes_of_a_penalty(
        head, lambda hidden: -head.log_prob(hidden)[torch.arange(M), TARGET].mean(), by
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_without_second_derivatives_says_so(name):
    head = REFUSED[name]().double()
    with pytest.raises(RuntimeError, match=r"second (derivatives|ones)|differentiated again"):
        slopes_of_a_penalty(head, lambda hidden: head(hidden, TARGET), "hidden")


@pytest.mark.parametrize("name", [name for name in RIGHT if name.startswith("clusters")])
def test_torch_func_sees_the_loss_of_a_clustered_layer(name):
    head = RIGHT[name]().double()
    weights = {key: x.detach() for key, x in head.named_parameters()}
    hidden = torch.randn(M, d, dtype=torch.float64)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(head, weights, (hidden, TARGET))

    got = torch.func.grad(loss)(weights)
    head(hidden, TARGET).backward()
    for key, x in head.named_parameters():
        torch.testing.assert_close(got[key], x.grad, rtol=1e-12, atol=1e-12)
    tangents = {key: torch.randn_like(x) for key, x in weights.items()}
    _, slope = torch.func.jvp(loss, (weights,), (tangents,))
    want = sum((tangents[key] * got[key]).sum() for key in got)
    torch.testing.assert_close(slope, want, rtol=1e-12, atol=1e-12)


def test_a_row_without_negatives_adds_nothing_to_any_derivative():
    """The other rows have the derivatives that they have without it."""
    torch.manual_seed(0)
    head = SampledSoftmaxLoss(d, D, sampler="in_batch", reduction="sum", dtype=torch.float64)
    hidden = torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    for target in (torch.tensor([1, 1, 1]), torch.tensor([1, 1, 2])):
        (first,) = torch.autograd.grad(head(hidden, target), hidden, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [hidden, head.weight])
        assert all(bool(x.isfinite().all()) for x in (first, *second))
        assert (first == 0).all() == (len(target.unique()) == 1)
    one = SampledSoftmaxLoss(d, D, num_samples=1, dtype=torch.float64)
    for _ in range(20):  # half of them draw a row its own target
        (first,) = torch.autograd.grad(
            one(hidden, torch.tensor([0, 0, 1])), hidden, create_graph=True
        )
        (second,) = torch.autograd.grad(first.square().sum(), one.weight)
        assert bool(second.isfinite().all())
