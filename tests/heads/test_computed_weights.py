"""Predictions follow the present weight where a hook computes it before every forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from softsphere import ClusteredLoss, LinearSphericalLoss, SampledSoftmaxLoss

d, D, m = 4, 12, 5
Layer = LinearSphericalLoss | SampledSoftmaxLoss | ClusteredLoss
LAYERS: dict[str, Callable[[], Layer]] = {
    "linear": lambda: LinearSphericalLoss(d, D),
    "sampled": lambda: SampledSoftmaxLoss(d, D, num_samples=D),
    "clustered": lambda: ClusteredLoss(d, D, torch.arange(D) % 4 - 1),
}
HOOKS: dict[str, Callable[[Layer], object]] = {
    "pruning": lambda head: prune.l1_unstructured(head, "weight", 0.3),
    "pruning of the bias": lambda head: prune.l1_unstructured(head, "bias", 0.3),
    "pruning twice": lambda head: (
        prune.l1_unstructured(head, "weight", 0.3),
        prune.random_unstructured(head, "weight", 0.2),
    ),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}
PREDICTIONS: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
    "log_prob": lambda head, x: head.log_prob(x),
    "topk": lambda head, x: head.topk(x, 3).values,
    "predict": lambda head, x: head.predict(x),
    "rank": lambda head, x: head.rank(x, torch.arange(len(x))),
}


def hooked(layer: str, hook: str) -> Layer:
    torch.manual_seed(0)
    head = LAYERS[layer]().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older norms
        HOOKS[hook](head)
    return head


def changed(head: Layer) -> Layer:
    """The layer with other parameters, of which the attribute `weight` knows nothing yet."""
    with torch.no_grad():
        for x in head.parameters():
            x.add_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    return head


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_prediction_reads_the_present_weight(layer, hook, prediction):
    head = changed(hooked(layer, hook)).eval()
    x = 3 * torch.randn(m, d, dtype=torch.float64)
    got = PREDICTIONS[prediction](head, x)
    head(x, torch.arange(m))  # runs the hooks
    torch.testing.assert_close(got, PREDICTIONS[prediction](head, x), rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_loaded_state_is_predicted_from(layer):
    head, other = changed(hooked(layer, "pruning")), hooked(layer, "pruning")
    other.load_state_dict(head.state_dict())
    x = torch.randn(m, d, dtype=torch.float64)
    torch.testing.assert_close(other.log_prob(x), head.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_prediction_changes_no_state_and_no_gradient(layer, hook):
    x, gradients = torch.randn(m, d, dtype=torch.float64), []
    for predicts in (False, True):
        head = hooked(layer, hook)
        torch.manual_seed(2)
        loss = head(x, torch.arange(m))
        if predicts:
            before = {name: value.clone() for name, value in head.state_dict().items()}
            head.predict(x)
            torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)
        loss.backward()
        gradients.append([x.grad for x in head.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_rows_of_a_clustered_layer_are_the_present_ones():
    head = hooked("clustered", "pruning")
    prune.l1_unstructured(head.root, "weight", 0.3)
    changed(head)
    classes = torch.arange(D)
    got = head.rows(classes)
    head(torch.randn(m, d, dtype=torch.float64), torch.arange(m))
    torch.testing.assert_close(got, head.rows(classes), rtol=0, atol=0)
