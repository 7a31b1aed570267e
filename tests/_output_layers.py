"""Output layers of both kinds beside the criterion on logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from _cases import CASES
from softsphere import (
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
    SphericalLoss,
)

d, D = 6, 31


SOME = torch.tensor([0, 5, 5, D - 1])


COUNTS = torch.arange(1.0, D + 1)


CLOSE = {"rtol": 1e-10, "atol": 1e-10}


LOSSES = ("taylor_softmax", "spherical_softmax", "softmax", "taylor_4", "soft_margin")


SPHERICAL = LOSSES[:2]


EVERY = [
    *((LinearSphericalLoss, x) for x in LOSSES),
    *((FactoredSphericalLoss, x) for x in SPHERICAL),
    (SampledSoftmaxLoss, "softmax"),
]


every_layer = pytest.mark.parametrize(
    ("kind", "name"), EVERY, ids=[f"{kind.__name__}-{name}" for kind, name in EVERY]
)


both = pytest.mark.parametrize("kind", [LinearSphericalLoss, FactoredSphericalLoss])


# Those and the layer of softmax alone, for what does not depend on the loss.
KINDS = [LinearSphericalLoss, FactoredSphericalLoss, SampledSoftmaxLoss]


every_kind = pytest.mark.parametrize("kind", KINDS)


all_or_some = pytest.mark.parametrize("classes", [None, SOME], ids=["all", "some"])


with_prior = pytest.mark.parametrize("prior", [None, COUNTS], ids=["uniform", "prior"])


def layer(kind, name="taylor_softmax", engine="auto", dtype=torch.float64, **options):
    """A layer. A factored one has taken some steps, and one of softmax alone has no prior."""
    torch.manual_seed(0)
    if kind is SampledSoftmaxLoss:
        options.pop("prior", None)
        return kind(d, D, num_samples=10, dtype=dtype, **options)
    if kind is LinearSphericalLoss:
        options["options"] = LinearSphericalOptions(engine=engine)
        return kind(d, D, CASES[name][0], dtype=dtype, **options)
    head = kind(d, D, CASES[name][0], dtype=dtype, **options)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        head(torch.randn(4, d, dtype=dtype), torch.randint(D, (4,))).backward()
        optimizer.step()
    optimizer.zero_grad()
    return head


def rows(*shape, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, d, generator=generator, dtype=dtype).requires_grad_()


class OnLogits(nn.Module):
    """The criterion on the logits of an nn.Linear with the weight of a layer."""

    def __init__(self, head):
        super().__init__()
        self.linear = nn.Linear(d, D, bias=head.bias is not None, dtype=head.weight.dtype)
        state = head.state_dict()
        self.linear.load_state_dict({name: state[name] for name in self.linear.state_dict()})
        self.criterion = SphericalLoss(head.loss, prior=head.base_measure)

    def forward(self, hidden, classes=None):
        logits = self.linear(hidden)
        found = self.criterion.log_prob(logits.flatten(0, -2)).view(logits.shape)
        return found if classes is None else found[..., classes]


def parts(head, grads):
    """Gradients with respect to hidden, W and b, from those of hidden and the parameters."""
    if not isinstance(head, FactoredSphericalLoss):
        return list(grads)
    hidden, G = grads
    assert type(G) is torch.Tensor and G.shape == head.weight.shape
    if head.base_measure is not None:
        G = G * head.base_measure.sqrt().unsqueeze(1)
    return [hidden, G[:, :d], *([G[:, d]] if head.bias is not None else [])]


class Largest(TorchDispatchMode):
    """Records the number of entries of each new tensor. Those of a sparse one are its values."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        every = out if isinstance(out, (tuple, list)) else [out]
        if not func.is_view and not func.name().endswith("_.Tensor"):
            dense = [x for x in every if isinstance(x, torch.Tensor) and not x.is_sparse]
            self.made += [x.numel() for x in dense]
        return out
