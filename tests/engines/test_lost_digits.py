"""Rows nearly orthogonal to a very large direction of W, whose hᵀGh has lost its digits.

What is left of hᵀGh is below the rounding of G there, and must be found in another way.
"""

from __future__ import annotations

import pytest
import torch

from _factored import NAMES
from _matrix_units import float32_may_be, float32_rounded_to
from _twin import DenseTwin, every_class
from softsphere import ClusteredLoss, FactoredSphericalLoss, losses
from softsphere.engines.factored_statistics import factored_statistics
from softsphere.optim import FactoredSGD

cpu = pytest.mark.once("a factored layer looks at its digits on a CPU alone")

D, d, m = 500, 16, 24
SCALES = [30.0, 1000.0]
EPS = torch.finfo(torch.float32).eps


def weight(scale: float, rows: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """A W (rows, d) with a direction v (d) that is `scale` long, and v."""
    torch.manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(d), dim=0)
    return scale * torch.randn(rows, 1) * v + 0.1 * torch.randn(rows, d), v


def rows_beside(v: torch.Tensor, rows: int = m) -> torch.Tensor:
    """Rows (rows, d) that are orthogonal to v but for rounding; the last one is not."""
    H = torch.randn(rows, d)
    H[:-1] -= torch.outer(H[:-1] @ v, v)
    return H


def errors(ours: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The relative error of each row of a gradient, but for the last.

    A row whose terms cancel to next to nothing is off by the rounding of these terms, which is
    measured against 3 % of a typical row.
    """
    size = exact.norm(dim=1)
    return ((ours - exact).norm(dim=1) / size.clamp_min(0.03 * size.median()))[:-1]


def measure(weights: torch.Tensor | None) -> torch.Tensor:
    """π of all classes, from weights in proportion to it."""
    if weights is None:
        return torch.ones(D).double()
    return weights.double() / weights.double().mean()


def factored(loss, W, b, weights):
    head = FactoredSphericalLoss(d, D, loss, bias=b is not None, prior=weights, reduction="none")
    given = {"weight": W} if b is None else {"weight": W, "bias": b}
    head.load_state_dict(given, strict=False)
    return head


@cpu
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weights", [None, torch.linspace(0.2, 2, D)], ids=["even", "prior"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", NAMES)
def test_a_factored_layer_has_the_digits_of_its_outputs(loss, bias, weights, scale):
    W, v = weight(scale)
    H, b = rows_beside(v), torch.randn(D) if bias else None
    head, target = factored(loss, W, b, weights), torch.randint(D, (m,))
    ours, exact = H.clone().requires_grad_(), H.double().requires_grad_()
    o = exact @ W.double().mT + (0 if b is None else b.double())
    each = every_class(losses.get(loss), o, measure(weights))
    want, value = each.gather(1, target.unsqueeze(1)).squeeze(1), head(ours, target)
    value.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(value.double(), want, rtol=3e-5, atol=0)
    # of the row that is not orthogonal to v much cancels in any order of sums
    error = errors(ours.grad, exact.grad)
    assert error.max() < 2 * EPS * scale
    if isinstance(head.loss, losses.Normalised):
        total = head.log_prob(H, torch.arange(D)).double().exp().sum(1)
        torch.testing.assert_close(total, torch.ones(m).double(), rtol=0, atol=1e-4)


@cpu
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weights", [None, torch.linspace(0.2, 2, D)], ids=["even", "prior"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_factored_layer_keeps_its_digits_through_steps(scale, weights, momentum):
    W, v = weight(scale)
    sgd = {"lr": 30 * (1 - momentum), "momentum": momentum}
    head, kind = factored("taylor_softmax", W, None, weights), losses.get("taylor_softmax")
    twin = DenseTwin(head.dense(), None, head.base_measure, **sgd)
    optimizer = FactoredSGD(head.parameters(), **sgd)
    for _ in range(30):
        H, target = rows_beside(v)[:-1], torch.randint(D, (m - 1,))
        optimizer.zero_grad()
        twin.sgd.zero_grad()
        value, want = head(H, target).mean(), twin.loss(kind, H, target).mean()
        value.backward()
        want.backward()
        torch.testing.assert_close(value.double(), want, rtol=2 * EPS * scale, atol=0)
        optimizer.step()
        twin.sgd.step()


@pytest.mark.parametrize("engine", ["factored", "auto"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", SCALES)
# clusters of many leaves, of few and of one
@pytest.mark.parametrize("C", [4, 120, D])
# by what W and the bias are multiplied after their sums are known, as weight decay does
@pytest.mark.parametrize("factor", [1, 1 / 1024, 1024])
def test_leaves_have_the_digits_of_their_outputs(factor, C, scale, bias, engine):
    W, v = weight(scale)
    assignment = torch.arange(D) % C
    head = ClusteredLoss(d, D, assignment, engine=engine, bias=bias)
    order = assignment.argsort(stable=True)
    given = {"weight": W[order], **({"bias": torch.randn(D)} if bias else {})}
    H, target = rows_beside(v, 160), torch.randint(D, (160,))
    small = {name: tensor / factor for name, tensor in given.items()}
    head.load_state_dict({**head.state_dict(), **small})
    if factor != 1:
        head(H, target)
        with torch.no_grad():
            for name in given.keys() & dict(head.named_parameters()):
                head.get_parameter(name).mul_(factor)
    b = given["bias"][order.argsort()].double() if bias else torch.zeros(D)
    ours, exact = H.clone().requires_grad_(), H.double().requires_grad_()
    f = 1 + (o := exact @ W.double().mT + b) + o.square() / 2
    sums = torch.zeros(len(H), C).double().index_add(1, assignment, f)
    root = exact @ head.root.weight.double().mT
    root = root if head.root.bias is None else root + head.root.bias.double()
    log_p = (f / sums[:, assignment]).log() + root.log_softmax(1)[:, assignment]
    want, value = -log_p.gather(1, target.unsqueeze(1)).mean(), head(ours, target)
    value.backward()
    want.backward()
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    error = errors(ours.grad, exact.grad)
    assert error.median() < 2 * EPS * scale
    assert error.max() < 100 * EPS * scale


@cpu
def test_only_rows_that_have_lost_them_read_all_of_the_weight():
    W, v = weight(1000.0)
    head, H = factored("taylor_softmax", W, None, None), torch.randn(m, d)
    H += 3 * v * torch.sign(H @ v).unsqueeze(1)
    head.matrix.arrays.know_sums()
    chunks, read = head.matrix.arrays.chunks, []
    head.matrix.arrays.chunks = lambda *given: read.append(given) or chunks(*given)
    head(H, torch.arange(m)).sum().backward()
    assert not read
    head(torch.cat([H, rows_beside(v)]), torch.arange(2 * m)).sum().backward()
    assert len(read) == 1


@cpu
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(("precision", "bits"), [("high", 10), ("medium", 7)])
def test_they_are_noticed_where_float32_products_are_rounded(monkeypatch, precision, bits, scale):
    W, v = weight(scale)
    H = torch.randn(400, d)
    H -= torch.outer((1 - torch.linspace(0, 0.3, 400)) * (H @ v), v)
    head = factored("squared_error", W, None, None)
    o = H.double() @ W.double().mT
    float32_may_be(monkeypatch, precision)
    with float32_rounded_to(bits, outside=False):
        x = factored_statistics(H, head.weight, torch.zeros(400, 1).long(), centred=False)
    torch.testing.assert_close(x.q.double(), o.square().sum(1), rtol=1e-3, atol=0)
