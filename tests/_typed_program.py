"""What a user's type checker finds, strictly: mypy in `make test`, Pyright in `test_packaging.py`.

Nobody runs these functions. A line with `type: ignore` has a mistake that a checker must find: a
comment that ignores nothing is an error too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import softsphere
from softsphere import clusters, functional, losses, optim
from softsphere.functional.probabilities import TopK


def criteria(rows: Tensor, labels: Tensor) -> None:
    criterion = softsphere.TaylorSoftmaxLoss(label_smoothing=0.1)
    assert_type(softsphere.__version__, str)
    assert_type(criterion(rows, labels), Tensor)
    assert_type(criterion.predict(rows), Tensor)
    assert_type(criterion.log_prob(rows), Tensor)
    assert_type(softsphere.SphericalLoss(losses.ZLoss(a=1.0))(rows, labels), Tensor)
    assert_type(functional.spherical_loss(rows, labels, losses.TaylorSoftmax()), Tensor)


def output_layers(rows: Tensor, labels: Tensor) -> None:
    linear = softsphere.LinearSphericalLoss(4, 10, options=softsphere.LinearSphericalOptions())
    assert_type(linear(rows, labels), Tensor)
    assert_type(linear(rows, labels, num_items=7), Tensor)
    assert_type(linear.topk(rows, 3), TopK)
    assert_type(linear.topk(rows, 3).indices, Tensor)
    assert_type(linear.rank(rows, labels), Tensor)
    adopted = softsphere.LinearSphericalLoss.from_linear(nn.Linear(4, 10))
    assert_type(adopted, softsphere.LinearSphericalLoss)
    found = clusters.by_frequency(torch.arange(1, 101))
    assert_type(found, clusters.Clusters)
    clustered = softsphere.ClusteredLoss(4, 100, found.assignment)
    assert_type(clustered(rows, labels), Tensor)
    assert_type(softsphere.SampledSoftmaxLoss(4, 100, 5)(rows, labels), Tensor)


def optimizers(rows: Tensor, labels: Tensor) -> None:
    factored = softsphere.FactoredSphericalLoss(4, 10)
    assert_type(factored(rows, labels, num_items=7), Tensor)
    assert_type(factored.to_linear(), nn.Linear)
    sgd = optim.FactoredSGD(factored.parameters(), lr=1.0)
    assert_type(sgd.step(), float | None)

    def train(x: Tensor, y: Tensor) -> Tensor:
        return factored(x, y)

    step = softsphere.CapturedStep(train, sgd, rows, labels)
    assert_type(step(rows, labels), Tensor | tuple[Tensor, ...] | None)


def mean_loss(
    head: softsphere.LinearSphericalLoss | softsphere.ClusteredLoss, hidden: Tensor, labels: Tensor
) -> Tensor:
    return head(hidden, labels).mean()


def mistakes(rows: Tensor, labels: Tensor) -> None:
    softsphere.TaylorSoftmaxLoss()(rows)  # type: ignore[call-arg]
    softsphere.TaylorSoftmaxLoss(reduction=3)  # type: ignore[arg-type]
    linear = softsphere.LinearSphericalLoss(4, 10)
    linear(rows, labels, masc=None)  # type: ignore[call-arg]
    linear.topk(rows, "3")  # type: ignore[arg-type]
    softsphere.ClusteredLoss(4, 100)  # type: ignore[call-arg]
    optim.FactoredSGD(linear.parameters(), momentum="large")  # type: ignore[arg-type]
