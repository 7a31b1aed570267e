"""Gradients in half precision are those of float64 but for rounding, however common a class is."""

from __future__ import annotations

import copy

import pytest
import torch

from _matrix_units import as_on_a_gpu
from softsphere import ClusteredLoss, LinearSphericalLoss, SampledSoftmaxLoss, half_products
from softsphere.engines import LinearSphericalOptions, wide_outputs
from softsphere.engines.repeated_rows import repeated_rows

m, D, d = 2048, 60, 8
# Half of the rows have the commonest of them.
TARGET = (D ** torch.linspace(0, 1, m)).long().clamp_max(D) - 1
CLASSES = torch.arange(D)
ASSIGNMENT = torch.arange(D) // 20


def with_prior(engine):
    """The gradient of a bias has two parts here that nearly cancel."""
    options = LinearSphericalOptions(engine=engine)
    prior = TARGET.bincount(minlength=D).clamp_min(1).double()
    return LinearSphericalLoss(d, D, "taylor_softmax", prior=prior, options=options)


def sampled(**options):
    return SampledSoftmaxLoss(d, D, num_samples=D, **options)


HEADS = {
    "linear": lambda: LinearSphericalLoss(d, D, "taylor_softmax"),
    "linear, chunked": lambda: LinearSphericalLoss(
        d, D, "taylor_softmax", options=LinearSphericalOptions("chunked")
    ),
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


def drawn_from(head, hidden):
    """Targets that pull at every class as much as it is pushed away, as late in training."""
    with torch.no_grad():
        return head.log_prob(hidden).exp().multinomial(1).squeeze(1)


def run_plainly(head, hidden, target):
    head(hidden, target).backward()


def run_under_autocast(head, hidden, target):
    head.float()
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss = head(hidden, target)
    loss.backward()


def run_with_its_backward_under_autocast(head, hidden, target):
    head.float()
    with torch.autocast(hidden.device.type, torch.bfloat16):
        head(hidden, target).backward()


def run_in_many_batches(head, hidden, target):
    n = 64
    with head.accumulate():
        for i in range(n):
            (head(hidden[i::n], target[i::n]) / n).backward()


def run_by_log_prob(head, hidden, target):
    log_p = head.log_prob(hidden, CLASSES)
    (-log_p.gather(1, target.unsqueeze(1)).mean()).backward()


RUNS = {
    "plainly": run_plainly,
    "under autocast": run_under_autocast,
    "with its backward under autocast": run_with_its_backward_under_autocast,
    "in many batches": run_in_many_batches,
    "by log_prob": run_by_log_prob,
}
NOT_FOR = {
    "in many batches": lambda name: name not in ("linear", "linear, with a prior, gram"),
    # autocast applies to the backward of plain operations there, whatever their forward was
    "with its backward under autocast": lambda name: "clustered" in name or "evaluation" in name,
}
BALANCED = [
    (name, run) for name in HEADS for run in RUNS if not (run in NOT_FOR and NOT_FOR[run](name))
]
# A plain linear layer with the few outputs of a root has errors of 0.005 to 0.014.
AS_PLAIN = {"root.weight": 2, "root.bias": 2}


@pytest.mark.parametrize(("name", "run"), BALANCED)
def test_gradients_that_nearly_cancel_are_rounded_once(name, run, device):
    torch.manual_seed(0)
    head = HEADS[name]().to(device, torch.bfloat16)
    exact = copy.deepcopy(head).double()
    # with a common part, so that gradients of all rows point there
    hidden = (torch.randn(8192, d) / 2 + 1).to(device, torch.bfloat16)
    target = drawn_from(exact, hidden.double())
    run_plainly(exact, hidden.double(), target)
    RUNS[run](head, hidden, target)
    for key, p in head.named_parameters():
        found, wanted = (x.to_dense().double() for x in (p.grad, exact.get_parameter(key).grad))
        error = (found - wanted).norm() / wanted.norm()
        assert float(error) < AS_PLAIN.get(key, 1) * torch.finfo(torch.bfloat16).eps, key


WITHOUT_LOGITS = pytest.mark.parametrize("engine", ["gram", "chunked"])


@WITHOUT_LOGITS
@pytest.mark.parametrize("bias", [False, True])
def test_a_gpu_rounds_gradients_that_nearly_cancel_once(bias, engine, monkeypatch):
    """There most rows of the gradient come from products with rounded matrices."""
    torch.manual_seed(0)
    classes = 20 * D  # more than targets
    options = LinearSphericalOptions(engine)
    head = LinearSphericalLoss(d, classes, "taylor_softmax", bias, options=options)
    with torch.no_grad():
        head.weight[:4] += 10  # common classes
    head.bfloat16()
    exact = copy.deepcopy(head).double()
    hidden = (torch.randn(classes - 1, d) + 1).bfloat16()
    target = drawn_from(exact, hidden.double())
    run_plainly(exact, hidden.double(), target)
    as_on_a_gpu(monkeypatch)
    run_plainly(head, hidden, target)
    for key, p in head.named_parameters():
        found, wanted = (x.grad[:4].double() for x in (p, exact.get_parameter(key)))
        error = (found - wanted).norm() / wanted.norm()
        assert float(error) < torch.finfo(torch.bfloat16).eps, key


@WITHOUT_LOGITS
@pytest.mark.parametrize("loss", ["taylor_softmax", "spherical_softmax"])
def test_a_gpu_keeps_the_digits_of_gradients_late_in_training(loss, engine, monkeypatch):
    """Where the targets have a probability of 0.999, a thousandth is left of push and pull."""
    torch.manual_seed(0)
    head = LinearSphericalLoss(D, D, loss, False, options=LinearSphericalOptions(engine))
    with torch.no_grad():
        head.weight.copy_(3 * torch.linalg.qr(torch.randn(D, D)).Q)
    head.bfloat16()
    exact, target = copy.deepcopy(head).double(), torch.arange(4 * D) % D
    hidden = 33 * head.weight.detach().float()[target] + 0.02 * torch.randn(4 * D, D)
    hidden = hidden.bfloat16()
    p = exact.log_prob(hidden.double()).exp().gather(1, target.unsqueeze(1))
    assert 0.998 < p.detach().mean() < 0.9999
    run_plainly(exact, hidden.double(), target)
    as_on_a_gpu(monkeypatch)
    run_plainly(head, hidden, target)
    found, wanted = head.weight.grad.double(), exact.weight.grad
    assert float((found - wanted).norm() / wanted.norm()) < torch.finfo(torch.bfloat16).eps / 2


@WITHOUT_LOGITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_takes_batches_without_rows(dtype, engine, monkeypatch):
    as_on_a_gpu(monkeypatch)
    head = LinearSphericalLoss(d, D, options=LinearSphericalOptions(engine), reduction="sum")
    head.to(dtype)
    head(torch.empty(0, d, dtype=dtype), torch.empty(0, dtype=torch.long)).backward()
    assert not head.weight.grad.any() and not head.bias.grad.any()


@WITHOUT_LOGITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_gives_a_single_class_no_gradient(dtype, engine, monkeypatch):
    """Push and pull cancel whatever the row is, so that its rounded common part must, too."""
    torch.manual_seed(0)
    as_on_a_gpu(monkeypatch)
    head = LinearSphericalLoss(d, 1, options=LinearSphericalOptions(engine), reduction="sum")
    with torch.no_grad():
        head.bias.fill_(1.3)
        head.weight += 16
    head.to(dtype)
    head(torch.randn(40, d).to(dtype), torch.zeros(40, dtype=torch.long)).backward()
    for p in head.parameters():
        assert float(p.grad.abs().max()) < 5e-5


@pytest.mark.parametrize("gpu", [False, True])
def test_small_gradients_of_sampled_softmax_do_not_vanish_in_float16(gpu, monkeypatch):
    torch.manual_seed(0)
    classes = 8192
    head = SampledSoftmaxLoss(d, classes, num_samples=classes, bias=False)
    exact = copy.deepcopy(head).double()
    hidden, target = torch.randn(m, d).half(), torch.zeros(m, dtype=torch.long)
    if gpu:
        as_on_a_gpu(monkeypatch)
        monkeypatch.setattr(wide_outputs, "multiplies", half_products.multiplies)
        monkeypatch.setattr(wide_outputs, "product", half_products.product)
    with torch.autocast("cpu", torch.float16):
        loss = head(hidden.float(), target)
    loss.backward()
    exact(hidden.double(), target).backward()
    found, wanted = head.weight.grad[1:].double(), exact.weight.grad[1:]
    assert float((found - wanted).norm() / wanted.norm()) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("leaf", ["taylor_softmax", "softmax"])
def test_a_cluster_of_many_tiles_is_summed_before_it_is_rounded(leaf):
    """Most rows are of one cluster, and are multiplied in many tiles of the size of the others."""
    torch.manual_seed(0)
    clusters, rows = 200, 20_000
    head = ClusteredLoss(
        d, 3 * clusters, torch.arange(3 * clusters) % clusters, leaf=leaf, engine="logits"
    )
    head.bfloat16()
    exact = copy.deepcopy(head).double()
    hidden = (torch.randn(rows, d) + 1).bfloat16()
    target = torch.randint(3, (rows,)) * clusters
    target[:clusters] = torch.arange(clusters)
    for each in (head, exact):
        each.reduction = "sum"
        (each(hidden.to(each.weight.dtype), target) / 64).backward()
    for name in ("weight", "bias"):
        found, wanted = (x.get_parameter(name).grad.double() for x in (head, exact))
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-4)


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
