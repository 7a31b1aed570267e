"""All engines of a linear layer agree, with each other and with the losses on its logits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from _cases import CASES
from _engines import ENGINES, SPHERICAL, layer
from softsphere import FactoredSphericalLoss, LinearSphericalOptions, checks
from softsphere.engines import choose, dispatch, moments, products
from softsphere.engines.dispatch import linear_statistics
from softsphere.engines.engine import Engine, Settings
from softsphere.engines.factored_statistics import factored_statistics
from softsphere.engines.operators import LinearOperator
from softsphere.functional import linear_spherical_loss, spherical_loss

TIGHT = {"rtol": 1e-10, "atol": 1e-11}

PLAIN = Settings(False, None, None, torch.float64, False)

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
    if K is not None and name == "squared_error":
        options["weight"] = None
    return H, W, b, target, options


def with_gradients(loss, *inputs):
    inputs = [x for x in inputs if x is not None]
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    if loss.dim() == 0:
        upstream = torch.full_like(loss, 1.7)
    return [loss, *torch.autograd.grad(loss, inputs, upstream)]


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


def outer_statistics(x, how):
    """s, q, c, and the outputs for the backward: an engine of a few lines."""
    o = x.H.to(how.dtype) @ x.W.to(how.dtype).mT
    return o.sum(1), o.square().sum(1), o.gather(1, x.target), o


def outer_gradients(g, x, kept, how, needs):
    (o,) = kept
    G = (g.s[:, None] + 2 * g.q[:, None] * o).scatter_add(1, x.target, g.c)
    return G @ x.W if needs[0] else None, G.mT @ x.H if needs[1] else None, None


def test_an_engine_is_one_file_and_one_line_in_the_list(monkeypatch):
    """The recipe of CONTRIBUTING, followed to the letter."""
    operator = LinearOperator("outer", outer_statistics, outer_gradients, keeps=("mD",))
    OUTER = Engine("outer", operator, cost=lambda work: 1.0, chunks=("row_chunk",))
    monkeypatch.setitem(dispatch.ENGINES, "outer", OUTER)
    H, W, _ = layer(5, 123, 4)
    target, want = torch.tensor([0, 7, 7, 122, 3]), []
    for options in (
        LinearSphericalOptions(engine="dense"),
        LinearSphericalOptions(engine="outer", row_chunk=3),
        LinearSphericalOptions(),
    ):
        for compiled in (False, True):

            def call(H, W, options=options):
                return linear_spherical_loss(H, W, target, "taylor_softmax", options=options)

            if compiled:
                call = torch.compile(call, fullgraph=True, backend="aot_eager")
            got = with_gradients(call(H, W), H, W)
            want = want or got
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, **TIGHT)
    assert choose(5, 123, 4, torch.float64, "cpu").engine == "outer"
    with pytest.raises(ValueError, match=r"class_chunk has no meaning for engine='outer'"):
        LinearSphericalOptions(engine="outer", class_chunk=3)
    torch.library.opcheck(operator.forward_operator, (H, W, None, target[:, None], None, *PLAIN))


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


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "triton"])
def test_accumulation_in_float64_of_float32(engine):
    H, W, b = layer(9, 123, 6, torch.float32)
    target = torch.randint(123, (9, 1))
    options = LinearSphericalOptions(engine=engine, accumulate_dtype=torch.float64)
    x = linear_statistics(H, W, b, target, None, centred=True, options=options)
    exact = linear_statistics(
        *(y.double() for y in (H, W, b)), target, None, centred=True, options=options
    )
    assert x.q.dtype == torch.float64
    # the outputs of the dense engine have been rounded already
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if engine == "dense" else {"rtol": 1e-12, "atol": 1e-12}
    )
    torch.testing.assert_close(x.q, exact.q, **tolerance)
    torch.testing.assert_close(x.c, exact.c, **tolerance)
    x.q.sum().backward()
    assert W.grad.dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["z_loss", "bohning_bound"])
def test_a_large_common_part_costs_no_digits(name, engine):
    """float32 outputs around 1000, where s and q apart would lose all that makes the loss."""
    H, W, b = layer(9, 507, 6, torch.float32)
    target = torch.randint(507, (9,))
    with torch.no_grad():
        b += 1000
    call = {"linear_bias": b, "options": ENGINES[engine]}
    got = with_gradients(linear_spherical_loss(H, W, target, name, **call), H, W)
    H, W, b = (x.detach().double().requires_grad_() for x in (H, W, b))
    call["linear_bias"] = b
    want = with_gradients(linear_spherical_loss(H, W, target, name, **call), H, W)
    for x, y in zip(got, want, strict=True):
        # a float32 near 1000 is known to 3e-5
        torch.testing.assert_close(x.double(), y, rtol=5e-4, atol=5e-4 * y.abs().max().item())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_sees_no_shift_sums_to_nothing(engine):
    """Σ_k ∂W_k = 0, also where float32 rows have 1000 times more in common than apart."""
    torch.manual_seed(0)
    H, b = torch.randn(9, 6), torch.randn(507, requires_grad=True)
    W = (torch.randn(507, 6) + 1000 * torch.randn(6)).requires_grad_()
    loss = linear_spherical_loss(
        H, W, torch.randint(507, (9,)), "bohning_bound", linear_bias=b, options=ENGINES[engine]
    )
    for grad in torch.autograd.grad(loss, [W, b]):
        assert grad.double().sum(0).norm() < 1e-6 * grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_equal_outputs_are_equal_to_the_z_loss(engine, prior, dtype):
    for seed in range(4):
        torch.manual_seed(seed)
        H = torch.randn(4, 6, dtype=dtype, requires_grad=True)
        W = 3 * torch.randn(1, 6, dtype=dtype).expand(507, 6)
        b = torch.randn(1, dtype=dtype).expand(507)
        loss = linear_spherical_loss(
            H, W, torch.tensor([0, 1, 1, 506]), "z_loss", linear_bias=b,
            prior=torch.rand(507, dtype=dtype) + 0.1 if prior else None, options=ENGINES[engine],
        )  # fmt: skip
        want = spherical_loss(torch.zeros(1, 507, dtype=dtype), torch.tensor([0]), "z_loss")
        torch.testing.assert_close(loss, want)
        assert not torch.autograd.grad(loss, H)[0].any()


def test_sums_over_many_chunks_lose_nothing():
    torch.manual_seed(0)
    H, W = torch.rand(3, 4), torch.rand(20_000, 4)
    target, options = torch.zeros(3, 1).long(), LinearSphericalOptions("gram", class_chunk=1)
    x = linear_statistics(H, W, None, target, None, centred=False, options=options)
    o = H.double() @ W.double().T
    torch.testing.assert_close(x.q.double(), o.square().sum(1), rtol=5e-7, atol=0)
    torch.testing.assert_close(x.s.double(), o.sum(1), rtol=5e-7, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sum_of_squares_is_not_negative_where_it_is_all_rounding(engine):
    torch.manual_seed(0)
    u, H = torch.randn(16), torch.randn(200, 16)
    W = torch.outer(torch.randn(507), u)
    H = H - torch.outer(H @ u, u / u.dot(u))  # all outputs are zero, to rounding
    target = torch.zeros(200, 1, dtype=torch.long)
    x = linear_statistics(H, W, None, target, None, centred=False, options=ENGINES[engine])
    assert (x.q >= 0).all() and x.q.max() < 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_any_target(engine):
    H, W, b = layer(5, 123, 4)
    target, values = torch.zeros(5, 0, dtype=torch.long), torch.zeros(5, 0).double()
    call = {"target_values": values, "reduction": "none"}
    got = linear_spherical_loss(
        H, W, target, "squared_error", linear_bias=b, options=ENGINES[engine], **call
    )
    torch.testing.assert_close(got, F.linear(H, W, b).square().sum(1), **TIGHT)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_is_that_of_the_linear_layer(engine, dtype):
    H, W, b = layer(9, 123, 6, torch.float32)
    target = torch.randint(123, (9,))
    with torch.autocast("cpu", dtype):
        got = linear_spherical_loss(
            H, W, target, "taylor_softmax", linear_bias=b, options=ENGINES[engine]
        )
        want = spherical_loss(F.linear(H, W, b), target, "taylor_softmax")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)
    H2, W2, b2 = (x.detach().to(dtype).float().requires_grad_() for x in (H, W, b))
    exact = linear_spherical_loss(
        H2, W2, target, "taylor_softmax", linear_bias=b2, options=ENGINES[engine]
    )
    # the rounded weight is what is used, and nothing but it is rounded
    torch.testing.assert_close(got, exact, rtol=2e-3 if engine == "dense" else 1e-6, atol=0)
    with torch.autocast("cpu", dtype):
        grads = torch.autograd.grad(got, [H, W, b])
    wanted = torch.autograd.grad(exact, [H2, W2, b2])
    for x, y in zip(grads, wanted, strict=True):
        assert x.dtype == torch.float32
        scale = y.abs().max().item()
        torch.testing.assert_close(x, y, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_leaves_float64_alone(engine):
    H, W, b = layer(5, 123, 4)
    target, call = torch.randint(123, (5,)), {"linear_bias": b, "options": ENGINES[engine]}
    want = linear_spherical_loss(H, W, target, "taylor_softmax", **call)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_spherical_loss(H, W, target, "taylor_softmax", **call)
    assert got.dtype == torch.float64 and torch.equal(got, want)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "dense"])
@pytest.mark.parametrize("case", ["plain", "prior", "repeated", "sparse"])
@pytest.mark.parametrize("name", ["taylor_softmax", "z_loss", "squared_error"])
def test_bfloat16_is_no_worse_than_on_logits(name, case, engine):
    torch.manual_seed(0)
    H, W, b = layer(63, 507, 32, torch.bfloat16)
    target = torch.randint(2 if case == "repeated" else 507, (63,))
    prior, values = torch.rand(507) + 0.2 if case == "prior" else None, None
    if case == "sparse":
        target, values = torch.randint(507, (63, 3)), torch.rand(63, 3)

    def run(which, inputs):
        loss = linear_spherical_loss(
            *inputs[:2], target, name, linear_bias=inputs[2], prior=prior, reduction="none",
            target_values=values, options=ENGINES[which],
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss.mean(), inputs)]

    exact = run("dense", [x.detach().double().requires_grad_() for x in (H, W, b)])
    dense, ours = run("dense", [H, W, b]), run(engine, [H, W, b])
    for x, y, z in zip(ours, dense, exact, strict=True):
        assert x.dtype == torch.bfloat16
        mine, theirs = ((g.double() - z).norm() / z.norm() for g in (x, y))
        assert mine <= theirs + 1e-3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
def test_low_precision_factors_multiplied_as_they_are(monkeypatch, bias, dtype):
    """What a GPU does, with its product of low-precision factors put in by hand."""
    H, W, b = layer(63, 507, 32, dtype, bias)
    target, options = torch.randint(507, (63,)), LinearSphericalOptions("gram", class_chunk=100)

    def run():
        loss = linear_spherical_loss(
            H, W, target, "taylor_softmax", linear_bias=b, options=options, reduction="sum"
        )
        return with_gradients(loss, H, W, b)

    want, used = run(), []

    def product(x, y, out_dtype, out=None):
        used.append(x.dtype)
        return torch.mm(x.to(out_dtype), y.to(out_dtype), out=out)

    monkeypatch.setattr(moments, "multiplies", lambda x, dtype: x.dtype != dtype)
    monkeypatch.setattr(moments, "product", product)
    for x, y in zip(run(), want, strict=True):
        assert (x.double() - y.double()).norm() <= torch.finfo(dtype).eps * y.double().norm()
    # six chunks, both ways, and with a bias as many products of a column
    assert used.count(dtype) == (24 if bias else 12)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rounding_to_float16_neither_vanishes_nor_overflows(size):
    A = size * torch.rand(4, 4)
    low, scale = products.rounded(A, torch.float16)
    torch.testing.assert_close(low.float() * scale, A, rtol=1e-3, atol=1e-6 * size)
    low, scale = products.rounded(torch.zeros(2, 2), torch.float16)
    assert not (low.float() * scale).any()
