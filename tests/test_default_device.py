"""Whatever `torch.set_default_device` says, layers compute where their parameters are."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch

import softsphere
from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
)
from softsphere.optim import FactoredSGD

pytestmark = pytest.mark.once("a default device is set")
D, d, m = 60, 5, 8
ASSIGNMENT = torch.arange(D) % 7 - 1
COUNTS = torch.arange(1.0, D + 1)


def linear(engine, loss="taylor_softmax"):
    return LinearSphericalLoss(
        d, D, loss, prior=COUNTS, options=LinearSphericalOptions(engine=engine)
    )


LAYERS = {
    **{engine: lambda engine=engine: linear(engine) for engine in ("gram", "chunked", "dense")},
    "softmax": lambda: linear("auto", "softmax"),
    "factored": lambda: FactoredSphericalLoss(d, D, prior=COUNTS),
    **{
        f"clusters, {engine}": lambda engine=engine: ClusteredLoss(
            d, D, ASSIGNMENT, counts=COUNTS, engine=engine
        )
        for engine in ("logits", "gram", "factored")
    },
    "clusters of softmax": lambda: ClusteredLoss(d, D, ASSIGNMENT, leaf="softmax", counts=COUNTS),
    "sampled, log_uniform": lambda: SampledSoftmaxLoss(d, D, 12),
    "sampled, frequency": lambda: SampledSoftmaxLoss(d, D, 12, sampler="frequency", counts=COUNTS),
    "sampled, in_batch": lambda: SampledSoftmaxLoss(d, D, sampler="in_batch", counts=COUNTS),
}


def used(make, elsewhere: str | None) -> list[torch.Tensor]:
    """What steps and predictions of a layer give, with another default device if one is named."""
    torch.manual_seed(0)
    head = make()
    factored = isinstance(head, FactoredSphericalLoss) or getattr(head, "engine", "") == "factored"
    kind = FactoredSGD if factored else torch.optim.SGD
    optimizer = kind(head.parameters(), lr=0.05)
    hidden, target = torch.randn(m, d, requires_grad=True), torch.randint(D, (m,))
    found = []
    with torch.device(elsewhere or "cpu"):
        for _ in range(4):
            optimizer.zero_grad()
            loss = head(hidden, target)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        head.eval()
        found += [head.log_prob(hidden), head.log_prob(hidden, target[:2]), head.predict(hidden)]
        found += [head.topk(hidden, 3).indices, head.rank(hidden, target), hidden.grad]
        other = copy.deepcopy(head)
        other.load_state_dict(head.state_dict())
        found.append(other(hidden, target))
        if hasattr(head, "matrix"):
            head.matrix.mend_()
            head.matrix.renew_()
            found.append(head.dense())
    return [x.detach() for x in found]


@pytest.mark.parametrize("name", LAYERS)
def test_the_default_device_is_that_of_new_layers_alone(name):
    torch.testing.assert_close(used(LAYERS[name], "meta"), used(LAYERS[name], None))


FACTORIES = {
    *("arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
}
# Where a function or a block says once for all that it computes on the CPU.
PLACED = ("clusters/", "heads/clustered_state.py", "parallel/sharding.py")


def without_device(path: Path) -> list[int]:
    """The lines with a call of PyTorch that makes a tensor and says nothing of a device."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            # `**made` holds the device that the caller has named
            named = {keyword.arg for keyword in node.keywords} & {"device", None}
            if of_torch and node.func.attr in FACTORIES and not named:
                found.append(node.lineno)
    return found


def test_whatever_makes_a_tensor_says_where():
    package = Path(softsphere.__file__).parent
    names = {path: path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    found = {
        name: lines
        for path, name in names.items()
        if not name.startswith(PLACED) and (lines := without_device(path))
    }
    assert not found
    assert any(without_device(path) for path, name in names.items() if name.startswith(PLACED))
