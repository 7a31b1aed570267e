"""Gradients in half precision are those of float64 but for rounding, however common a class is."""

from __future__ import annotations

import copy

import pytest
import torch

from softsphere import ClusteredLoss, LinearSphericalLoss, SampledSoftmaxLoss
from softsphere.engines import LinearSphericalOptions
from softsphere.engines.repeated_rows import repeated_rows

m, D, d = 2048, 60, 8
# Half of the rows have the commonest of them.
TARGET = (D ** torch.linspace(0, 1, m)).long().clamp_max(D) - 1
ASSIGNMENT = torch.arange(D) // 20


def with_prior(engine):
    """The gradient of a bias has two parts here that nearly cancel."""
    options = LinearSphericalOptions(engine=engine)
    prior = TARGET.bincount(minlength=D).clamp_min(1).double()
    return LinearSphericalLoss(d, D, "z_loss", prior=prior, options=options)


def sampled(**options):
    return SampledSoftmaxLoss(d, D, num_samples=D, **options)


HEADS = {
    "linear": lambda: LinearSphericalLoss(d, D, "taylor_softmax"),
    "linear, with a prior, gram": lambda: with_prior("gram"),
    "linear, with a prior, chunked": lambda: with_prior("chunked"),
    "linear softmax": lambda: LinearSphericalLoss(d, D, "softmax"),
    "clustered gram": lambda: ClusteredLoss(d, D, ASSIGNMENT, engine="gram"),
    "clustered logits": lambda: ClusteredLoss(d, D, ASSIGNMENT, engine="logits"),
    "clustered softmax": lambda: ClusteredLoss(d, D, ASSIGNMENT, leaf="softmax"),
    "clustered sparse": lambda: ClusteredLoss(d, D, ASSIGNMENT, sparse=True),
    "sampled": sampled,
    "sampled sparse": lambda: sampled(sparse=True),
    "sampled in evaluation": lambda: sampled().eval(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_of_common_classes_do_not_stand_still(name, dtype, device):
    torch.manual_seed(0)
    half = HEADS[name]().to(device, dtype)
    exact = copy.deepcopy(half).double()
    hidden, target = torch.randn(m, d).to(device, dtype), TARGET.to(device)
    found, wanted = ({}, {})
    for head, gradients in ((half, found), (exact, wanted)):
        torch.manual_seed(1)  # the same negatives
        # a sum, so that float16 has the digits of its gradients
        head.reduction = "sum"
        (head(hidden.to(head.weight.dtype), target) / 16).backward()
        for key, p in head.named_parameters():
            gradients[key] = p.grad.to_dense().double()
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        error = (found[key] - gradient).norm() / gradient.norm()
        assert float(error) < 4 * torch.finfo(dtype).eps, key


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_tied_rows_do_not_stand_still(sparse):
    torch.manual_seed(0)
    head = ClusteredLoss(d, D, ASSIGNMENT - 1, sparse=sparse, dtype=torch.bfloat16)
    exact = copy.deepcopy(head).double()
    for each in (head, exact):
        each.rows(TARGET).sum().backward()
    for name in ("weight", "root.weight"):
        found, wanted = (x.get_parameter(name).grad.to_dense().double() for x in (head, exact))
        torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("engine", ["gram", "logits"])
def test_gradients_that_nearly_cancel_are_rounded_once(engine):
    """Targets are drawn from the model, so that every class is pulled as much as it is pushed."""
    torch.manual_seed(0)
    head = ClusteredLoss(d, D, ASSIGNMENT, engine=engine, dtype=torch.bfloat16)
    exact = copy.deepcopy(head).double()
    hidden = torch.randn(8192, d).bfloat16()
    target = exact.log_prob(hidden.double()).exp().multinomial(1).squeeze(1)
    for each in (head, exact):
        each(hidden.to(each.weight.dtype), target).backward()
    for name in ("weight", "bias"):
        found, wanted = (x.get_parameter(name).grad.double() for x in (head, exact))
        error = (found - wanted).norm() / wanted.norm()
        assert float(error) < torch.finfo(torch.bfloat16).eps, name


def test_a_repeated_row_is_read_once_for_its_gradient():
    x = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    for index in ([4, 0, 4, 4, 2], [3], []):
        at = torch.tensor(index, dtype=torch.long)
        for given in (x, x[:, 0]):
            rows = repeated_rows(given, at, torch.float32)
            assert rows.dtype == torch.float32 and torch.equal(rows, given[at].float())
            (found,) = torch.autograd.grad(rows.sum(), x, retain_graph=True)
            (wanted,) = torch.autograd.grad(given.float()[at].sum(), x, retain_graph=True)
            assert torch.equal(found, wanted)
