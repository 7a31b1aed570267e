"""Every loss against its oracle, its derivatives and its declared properties."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import _oracle as oracle
from _cases import CASES
from softsphere import losses
from softsphere.engines.row_statistics import output_statistics
from softsphere.functional import log_prob, spherical_loss
from softsphere.losses.bouchard_bound import best_xi
from softsphere.stats import Stats

ALL = sorted(CASES)
SPHERICAL = [name for name in ALL if isinstance(CASES[name][0], losses.Spherical)]
PRIORS = [None, torch.tensor([5.0, 1.0, 2.0, 9.0, 4.0, 0.5, 1.0], dtype=torch.float64)]


def outputs(rows: int = 6, classes: int = 7, scale: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(rows, classes, dtype=torch.float64, generator=generator)


def pi_of(prior: torch.Tensor | None, classes: int) -> list[float]:
    if prior is None:
        return [1.0] * classes
    return (prior * classes / prior.sum()).tolist()


def reference(name: str, o: torch.Tensor, target: torch.Tensor, prior) -> torch.Tensor:
    pi = pi_of(prior, o.shape[-1])
    define = CASES[name][1]
    return torch.tensor(
        [define(row, t, pi) for row, t in zip(o.tolist(), target.tolist(), strict=True)],
        dtype=torch.float64,
    )


def test_every_registered_loss_has_a_case():
    assert set(losses.REGISTRY.values()) == {type(loss) for loss, _ in CASES.values()}


@pytest.mark.parametrize("prior", PRIORS, ids=["uniform", "prior"])
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_agree_with_the_oracle(name, prior):
    o, target = outputs(), torch.tensor([0, 6, 3, 3, 1, 5])
    got = o.clone().requires_grad_()
    rows = spherical_loss(got, target, CASES[name][0], prior=prior, reduction="none")
    tight = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(rows, reference(name, o, target, prior), **tight)
    (gradient,) = torch.autograd.grad(rows.sum(), got)
    h = 1e-5
    for k in range(o.shape[1]):
        step = torch.zeros_like(o)
        step[:, k] = h
        above = reference(name, o + step, target, prior)
        slope = (above - reference(name, o - step, target, prior)) / (2 * h)
        torch.testing.assert_close(gradient[:, k], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prior", PRIORS, ids=["uniform", "prior"])
@pytest.mark.parametrize("name", SPHERICAL)
def test_derivatives_by_the_statistics_are_the_formulas_of_the_docstrings(name, prior):
    loss = CASES[name][0]
    o, target = outputs(), torch.tensor([[0, 2], [6, 1], [3, 4], [3, 0], [1, 2], [5, 6]])
    pi = None if prior is None else prior * 7 / prior.sum()
    x = output_statistics(o, target, pi, centred=False)
    s, q, c = (z.requires_grad_() for z in (x.s, x.q, x.c))
    y = torch.linspace(0.2, 1.3, 12, dtype=torch.float64).view(6, 2)

    def value(s, q, c):
        return loss.value(Stats(s, q, c, 7.0, y=y, pi=x.pi))

    assert gradcheck(value, (s, q, c))
    got = torch.autograd.grad(
        value(s, q, c).sum(), (s, q, c), allow_unused=True, materialize_grads=True
    )
    at_targets = torch.ones_like(y) if pi is None else pi[target]
    for i in range(6):
        row = s[i].item(), q[i].item()
        want = [
            oracle.partials(
                name, *row, c[i, j].item(), 7.0, y[i, j].item(), at_targets[i, j].item()
            )
            for j in range(2)
        ]
        if isinstance(loss, losses.SquaredError):  # q is there once for the whole vector
            want = [(ds, dq / 2, dc) for ds, dq, dc in want]
        assert got[0][i].item() == pytest.approx(sum(x[0] for x in want), rel=1e-9, abs=1e-12)
        assert got[1][i].item() == pytest.approx(sum(x[1] for x in want), rel=1e-9, abs=1e-12)
        assert got[2][i].tolist() == pytest.approx([x[2] for x in want], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prior", PRIORS, ids=["uniform", "prior"])
def test_first_and_second_derivatives(name, prior):
    o = outputs(3).requires_grad_()
    target = torch.tensor([0, 6, 3])

    def f(o):
        return spherical_loss(o, target, CASES[name][0], prior=prior, reduction="none")

    assert gradcheck(f, o)
    assert gradgradcheck(f, o)


@pytest.mark.parametrize("name", ALL)
def test_declared_properties(name):
    loss = CASES[name][0]
    o, target = outputs(), torch.tensor([0, 6, 3, 3, 1, 5])

    def value(o):
        return spherical_loss(o, target, loss, reduction="none")

    shifted = torch.allclose(value(o), value(o + 0.7), rtol=1e-9)
    scaled = torch.allclose(value(o), value(o * 1.7), rtol=1e-9)
    assert (shifted, scaled) == (shift(loss), loss.scale_invariant)
    if loss.upper_bound:
        softmax = torch.nn.functional.cross_entropy(o, target, reduction="none")
        assert (value(o) >= softmax - 1e-12).all()
    if loss.normalised:
        total = log_prob(o, loss, prior=PRIORS[1]).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
    else:
        with pytest.raises(TypeError, match="not a normalised distribution"):
            log_prob(o, loss)


def shift(loss: losses.Loss) -> bool:
    margin = isinstance(loss, losses.SoftMarginSoftmax) and loss.order is None
    return loss.shift_invariant or margin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("name", ALL)
def test_finite_over_the_range(name, scale, dtype):
    o = outputs(scale=scale).to(dtype).requires_grad_()
    loss = spherical_loss(o, torch.tensor([0, 6, 3, 3, 1, 5]), CASES[name][0], reduction="none")
    assert loss.dtype == dtype
    loss.float().sum().backward()
    assert o.grad.isfinite().all()
    assert dtype != torch.float32 or loss.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_all_outputs_equal(name):
    o = torch.full((2, 5), 3.0, requires_grad=True)
    loss = spherical_loss(o, torch.tensor([0, 4]), CASES[name][0])
    loss.backward()
    assert loss.isfinite()
    assert o.grad.isfinite().all()
    if name == "z_loss":
        assert not o.grad.any()


def test_z_loss_keeps_its_digits_far_from_zero():
    o = outputs() + 3000.0
    target = torch.tensor([0, 6, 3, 3, 1, 5])
    rounded = o.float()
    got = spherical_loss(rounded, target, "z_loss", reduction="none")
    want = spherical_loss(rounded.double(), target, "z_loss", reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 10**7])
def test_bouchard_finds_its_minimum(classes):
    v = torch.logspace(-8, 8, 65, dtype=torch.float64)
    xi = best_xi(v, float(classes))
    kappa = (classes - 2) / classes
    # ξ² − (κ ξ coth(ξ/2))² = v, the stationarity condition as the papers write it
    residual = xi**2 - (kappa * xi / torch.tanh(xi / 2)) ** 2 - v
    assert (residual.abs() <= 1e-12 * xi**2 + 1e-10 * v + 1e-10).all()


@pytest.mark.parametrize("slope", [0.0, 1e38])
@pytest.mark.parametrize("name", SPHERICAL)
def test_a_sum_of_squares_that_overflows_gives_no_loss(name, slope):
    q = torch.tensor([torch.inf, 7.0])
    x = Stats(torch.tensor([slope, 0.0]), q, torch.tensor([[1.0], [1.0]]), mass=7.0)
    finite = CASES[name][0].value(x).isfinite()
    assert finite.tolist() == [False, True]
