"""All engines of a linear layer agree, with each other and with the losses on its logits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from _cases import CASES
from _engines import ENGINES, SPHERICAL, layer, with_gradients
from softsphere import FactoredSphericalLoss, LinearSphericalOptions, checks, losses
from softsphere.engines.dispatch import linear_statistics
from softsphere.engines.factored_statistics import factored_statistics
from softsphere.functional import linear_spherical_loss, spherical_loss

TIGHT = {"rtol": 1e-10, "atol": 1e-11}

# What a call varies: each of these with every loss and every engine.
SETTINGS = {
    "plain": {"bias": False},
    "bias": {},
    "prior": {"prior": True, "bias": False},
    "prior bias": {"prior": True},
    "class weight": {"weight": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "prior": True},
    "ignored": {"ignored": True, "weight": True},
    "repeated": {"classes": 2, "prior": True},
    "sparse": {"K": 3},
    "sparse prior weight": {"K": 3, "prior": True, "weight": True, "ignored": True},
    "one row": {"m": 1},
    "odd": {"m": 63, "D": 507, "d": 9, "prior": True},
    "wide": {"m": 3, "D": 40, "d": 600},
}


def setting(name, m=13, D=123, d=6, K=None, classes=None, ignored=False, **options):
    """H, W, b, target and the keywords of the call."""
    torch.manual_seed(0)
    H, W, b = layer(m, D, d, bias=options.pop("bias", True))
    target = torch.randint(classes or D, (m,) if K is None else (m, K))
    target[0] = D - 1
    target[-1] = 0
    if K is not None:
        target[m // 2, 1] = -1
        options["target_values"] = torch.randn(m, K).double()
    if ignored:
        target[1] = -100
    for key in ("prior", "weight"):
        if options.get(key):
            options[key] = torch.rand(D).double() + 0.2
    if K is not None and isinstance(SPHERICAL[name], losses.SquaredError):
        options["weight"] = None
    return H, W, b, target, options


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", SPHERICAL)
def test_engines_agree_with_the_loss_on_logits_and_pairwise(name, case):
    H, W, b, target, options = setting(name, **SETTINGS[case])
    results = {"logits": spherical_loss(F.linear(H, W, b), target, SPHERICAL[name], **options)}
    for engine, how in ENGINES.items():
        results[engine] = linear_spherical_loss(
            H, W, target, SPHERICAL[name], linear_bias=b, options=how, **options
        )
    results = {key: with_gradients(loss, H, W, b) for key, loss in results.items()}
    for one, two in itertools.combinations(results, 2):
        for x, y in zip(results[one], results[two], strict=True):
            torch.testing.assert_close(
                x, y, **TIGHT, msg=lambda text, a=one, b=two: f"{a}, {b}: {text}"
            )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SPHERICAL)
def test_engines_agree_with_explicit_loops(name, engine):
    H, W, b = layer(3, 7, 4)
    target, counts = torch.tensor([0, 6, 6]), torch.arange(1.0, 8.0).double()
    loss = linear_spherical_loss(
        H, W, target, SPHERICAL[name], linear_bias=b, prior=counts, reduction="none",
        options=LinearSphericalOptions(engine=engine),
    )  # fmt: skip
    pi = (counts * 7 / counts.sum()).tolist()
    W, b = W.tolist(), b.tolist()
    for i, h in enumerate(H.tolist()):
        o = [sum(x * y for x, y in zip(row, h, strict=True)) + b[k] for k, row in enumerate(W)]
        want = CASES[name][1](o, int(target[i]), pi)
        assert loss[i].item() == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_with_the_factored_layer(engine, prior, centred):
    H, W, b = layer(11, 123, 6)
    counts = torch.rand(123).double() + 0.2 if prior else None
    head = FactoredSphericalLoss(6, 123, prior=counts, dtype=torch.float64)
    head.load_state_dict({"weight": W.detach(), "bias": b.detach()})
    target = torch.randint(123, (11, 2))
    pi = None if counts is None else checks.prior(counts)
    got = linear_statistics(H, W, b, target, pi, centred=centred, options=ENGINES[engine])
    rows = head._reader().rows_of(H.detach()).requires_grad_()
    want = factored_statistics(rows, head.weight, target, centred=centred)
    for key in ("s", "q", "c", "mass", "pi"):
        torch.testing.assert_close(getattr(got, key), getattr(want, key), **TIGHT)
    (got.q.sum() + got.c.square().sum()).backward()
    (want.q.sum() + want.c.square().sum()).backward()
    torch.testing.assert_close(H.grad, rows.grad[:, :6], **TIGHT)
    G = head.matrix.to_dense_gradient(head.weight.grad.value) * (
        1 if pi is None else pi.unsqueeze(1)
    )
    torch.testing.assert_close(W.grad, G[:, :6], **TIGHT)
    torch.testing.assert_close(b.grad, G[:, 6], **TIGHT)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_classes_of_no_mass_take_no_part(engine, centred, weighted):
    H, W, b = layer(7, 257, 5)
    torch.manual_seed(1)
    kept = (torch.rand(257) > 0.4).nonzero().squeeze(1)
    kept = kept[kept > 120]  # whole chunks are of no mass
    pi = torch.zeros(257).double()
    pi[kept] = torch.rand(len(kept)).double() + 0.1 if weighted else 1.0
    t = torch.randint(len(kept), (7, 2))
    x = linear_statistics(
        H, W, b, kept[t], pi, centred=centred, options=ENGINES[engine], mass=pi.sum()
    )
    o = F.linear(H, W[kept], b[kept])
    if centred:
        o = o - (o @ pi[kept] / pi.sum()).unsqueeze(1)
    want = [o @ pi[kept], o.square() @ pi[kept], o.gather(1, t)]
    got = [x.s, x.q, x.c]
    for y, z in zip(got, want, strict=True):
        torch.testing.assert_close(y, z, **TIGHT)
    torch.testing.assert_close(x.mass, pi.sum())
    weights = torch.linspace(0.5, 2, 7).double()
    results = [
        torch.autograd.grad((weights * (s + q + c.sum(1))).sum(), [H, W, b])
        for s, q, c in (got, want)
    ]
    for y, z in zip(*results, strict=True):
        torch.testing.assert_close(y, z, **TIGHT)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("engine", ENGINES)
def test_leading_shapes_and_empty_batches(engine, reduction, shape):
    H, W, b = torch.randn(*shape, 4).double().requires_grad_(), *layer(1, 9, 4)[1:]
    target = torch.randint(9, shape)
    loss = linear_spherical_loss(
        H, W, target, "taylor_softmax", linear_bias=b, reduction=reduction, options=ENGINES[engine]
    )
    logits = F.linear(H, W, b).reshape(-1, 9)
    want = spherical_loss(logits, target.reshape(-1), "taylor_softmax", reduction=reduction)
    torch.testing.assert_close(loss, want.view(loss.shape), equal_nan=True, **TIGHT)
    assert loss.shape == (shape if reduction == "none" else ())
    if reduction != "mean":
        loss.sum().backward()
        assert H.grad.shape == H.shape and W.grad.isfinite().all()
        assert H.numel() or not W.grad.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wholly_ignored_batch_is_as_in_cross_entropy(engine):
    H, W, _ = layer(3, 9, 4)
    target = torch.full((3,), -100)
    for reduction in ("mean", "sum"):
        got = linear_spherical_loss(
            H, W, target, "taylor_softmax", reduction=reduction, options=ENGINES[engine]
        )
        want = F.cross_entropy(F.linear(H, W), target, reduction=reduction)
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_retained_graphs_and_two_upstream_gradients(engine):
    H, W, b = layer(5, 123, 4)
    target = torch.tensor([0, 7, 7, 122, 3])
    loss = linear_spherical_loss(
        H, W, target, "z_loss", linear_bias=b, reduction="none", options=ENGINES[engine]
    )
    u, v = torch.randn(2, 5).double()
    inputs = [H, W, b]
    first = torch.autograd.grad(loss, inputs, u, retain_graph=True)
    other = torch.autograd.grad(loss, inputs, v, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, u, retain_graph=True)
    both = torch.autograd.grad(loss, inputs, u - 3 * v)
    for x, y, z, xy in zip(first, other, again, both, strict=True):
        assert torch.equal(x, z)
        torch.testing.assert_close(xy, x - 3 * y, **TIGHT)


@pytest.mark.parametrize("engine", ENGINES)
def test_expanded_upstream_gradients_are_read_and_left_alone(engine):
    H, W, b = layer(5, 123, 4)
    target = torch.tensor([[0, 2], [7, 1], [7, 7], [122, 5], [3, 9]])
    x = linear_statistics(H, W, b, target, None, centred=False, options=ENGINES[engine])
    one = torch.tensor(0.5).double()
    outputs, inputs = [x.s, x.q, x.c], [H, W, b]
    expanded = [one.expand(y.shape) for y in outputs]
    got = torch.autograd.grad(outputs, inputs, expanded, retain_graph=True)
    want = torch.autograd.grad(outputs, inputs, [y.clone() for y in expanded])
    assert one == 0.5
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(engine, frozen):
    inputs = layer(5, 123, 4)
    target = torch.tensor([0, 7, 7, 122, 3])

    def gradients():
        H, W, b = inputs
        linear_spherical_loss(
            H, W, target, "taylor_softmax", linear_bias=b, options=ENGINES[engine]
        ).backward()
        grads = [x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        return grads

    all_of_them = gradients()
    for i in frozen:
        inputs[i].requires_grad_(False)
    for i, grad in enumerate(gradients()):
        if i in frozen:
            assert grad is None
        else:
            torch.testing.assert_close(grad, all_of_them[i], **TIGHT)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "a part of rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_other_layouts_of_input_and_weight(engine, layout):
    H, W, b = (x.detach() for x in layer(5, 123, 4))
    target = torch.tensor([0, 7, 7, 122, 3])
    results = []
    for change in (LAYOUTS[layout], torch.clone):
        h, w = change(H).requires_grad_(), change(W).requires_grad_()
        loss = linear_spherical_loss(h, w, target, "z_loss", linear_bias=b, options=ENGINES[engine])
        results.append(with_gradients(loss, h, w))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "dense"])
def test_a_weight_changed_before_backward_is_found_out(engine):
    H, W, _ = layer(5, 123, 4)
    target = torch.tensor([0, 7, 7, 122, 3])
    loss = linear_spherical_loss(H, W, target, "taylor_softmax", options=ENGINES[engine])
    with torch.no_grad():
        W.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_any_target(engine):
    H, W, b = layer(5, 123, 4)
    target, values = torch.zeros(5, 0, dtype=torch.long), torch.zeros(5, 0).double()
    call = {"target_values": values, "reduction": "none"}
    got = linear_spherical_loss(
        H, W, target, "squared_error", linear_bias=b, options=ENGINES[engine], **call
    )
    torch.testing.assert_close(got, F.linear(H, W, b).square().sum(1), **TIGHT)
