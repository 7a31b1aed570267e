"""The criteria beside `nn.CrossEntropyLoss`: softmax must be it, and the others behave like it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import _oracle as oracle
import softsphere
from _cases import CASES
from _devices import autocasts
from softsphere import losses
from softsphere.functional import spherical_loss

ALL = sorted(CASES)
SHAPES = {"C": (7,), "NC": (5, 7), "NCd": (5, 7, 3), "NCdd": (2, 7, 3, 4)}


def problem(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return logits, torch.randint(7, rows, generator=generator)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.flip(0).softmax(0 if logits.dim() == 1 else 1)


WEIGHT = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["indices", "ignored", "all_ignored", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_softmax_is_cross_entropy(shape, kind, reduction, weight, smoothing):
    logits, target = problem(shape)
    if kind == "probabilities":
        target = probabilities(logits)
    elif kind == "all_ignored":
        target = torch.full_like(target, -100)
    elif kind == "ignored":
        target = torch.where(torch.arange(target.numel()).view(target.shape) % 2 == 1, -100, target)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = softsphere.SphericalLoss("softmax", **options)(a, target)
    want = nn.CrossEntropyLoss(**options)(b, target)
    torch.testing.assert_close(got, want, equal_nan=True)
    upstream = torch.rand_like(want)
    got.backward(upstream)
    want.backward(upstream)
    if kind != "all_ignored" or reduction != "mean":
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_loss_keeps_the_conventions(name, shape):
    loss = CASES[name][0]
    logits, target = problem(shape)
    dim = 0 if len(shape) == 1 else 1
    rows = spherical_loss(logits, target, loss, reduction="none")
    assert rows.shape == target.shape
    flat = logits.movedim(dim, -1).reshape(-1, 7)
    alone = [spherical_loss(o, t, loss) for o, t in zip(flat, target.reshape(-1), strict=True)]
    torch.testing.assert_close(rows.reshape(-1), torch.stack(alone))

    one_hot = nn.functional.one_hot(target, 7).movedim(-1, dim).double()
    soft = spherical_loss(logits, one_hot, loss, reduction="none")
    torch.testing.assert_close(rows, soft)

    weighted = spherical_loss(logits, target, loss, weight=WEIGHT)
    w = WEIGHT[target]
    torch.testing.assert_close(weighted, (w * rows).sum() / w.sum())

    every = torch.stack(
        [
            spherical_loss(logits, torch.full_like(target, k), loss, reduction="none")
            for k in range(7)
        ]
    )
    if loss.smoothable:
        smooth = spherical_loss(logits, target, loss, reduction="none", label_smoothing=0.3)
        torch.testing.assert_close(smooth, 0.7 * rows + 0.3 * every.mean(0))
    else:
        with pytest.raises(ValueError, match="label_smoothing"):
            spherical_loss(logits, target, loss, label_smoothing=0.3)


@pytest.mark.parametrize("name", ALL)
def test_ignored_rows_count_for_nothing(name):
    loss = CASES[name][0]
    logits, target = problem((5, 7))
    target[1] = 255
    kept = torch.tensor([0, 2, 3, 4])
    o = logits.clone().requires_grad_()
    got = spherical_loss(o, target, loss, ignore_index=255)
    torch.testing.assert_close(got, spherical_loss(logits[kept], target[kept], loss))
    got.backward()
    assert not o.grad[1].any()


@pytest.mark.parametrize("name", ALL)
def test_sparse_targets(name):
    """Padding in any place, repeated indices that add up, rows that are ignored whole."""
    loss = CASES[name][0]
    logits, _ = problem((3, 7))
    target = torch.tensor([[-1, 2, 2, 5], [6, -1, 0, -1], [-100, -100, -100, -100]])
    values = torch.tensor([[9.0, 0.5, 0.25, -1.5], [1.0, 7.0, 2.0, 7.0], [1.0] * 4]).double()
    rows = spherical_loss(logits, target, loss, target_values=values, reduction="none")
    vector = torch.zeros(3, 7, dtype=torch.float64)
    vector[0, 2], vector[0, 5], vector[1, 6], vector[1, 0] = 0.75, -1.5, 1.0, 2.0
    if isinstance(loss, losses.SquaredError):
        want = torch.tensor(
            [
                oracle.squared_error_vector(row, y, [1.0] * 7, loss.unobserved)
                for row, y in zip(logits.tolist(), vector.tolist(), strict=True)
            ],
            dtype=torch.float64,
        )
    else:
        every = [
            spherical_loss(logits, torch.full((3,), k), loss, reduction="none") for k in range(7)
        ]
        want = (vector * torch.stack(every, -1)).sum(-1)
    want[2] = 0
    torch.testing.assert_close(rows, want)
    mean = spherical_loss(logits, target, loss, target_values=values)
    torch.testing.assert_close(mean, want.sum() / 2)


@pytest.mark.parametrize("name", ALL)
def test_vmap_and_grad(name):
    loss = CASES[name][0]
    logits, target = problem((5, 7))

    def one(o, t):
        return spherical_loss(o, t, loss)

    torch.testing.assert_close(
        torch.func.vmap(one)(logits, target),
        spherical_loss(logits, target, loss, reduction="none"),
    )
    o = logits.clone().requires_grad_()
    spherical_loss(o, target, loss, reduction="sum").backward()
    per_row = torch.func.vmap(torch.func.grad(one))(logits, target)
    torch.testing.assert_close(per_row, o.grad)
    shared = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(logits[0], target)
    torch.testing.assert_close(shared[2], torch.func.grad(one)(logits[0], target[2]))


# A compilation takes seconds, and the others have the same operations.
COMPILED = ("squared_error", "taylor_softmax", "bouchard_bound", "softmax")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in COMPILED else pytest.mark.slow) for name in ALL],
)
def test_compile_without_a_graph_break(name):
    # the compiler keeps eight specialisations of one forward, and there are more losses here
    torch.compiler.reset()
    criterion = softsphere.SphericalLoss(CASES[name][0], prior=torch.arange(1.0, 8.0))
    logits, target = problem((5, 7))
    target[2] = -100
    a, b = logits.float().requires_grad_(), logits.float().requires_grad_()
    # the partitioner of PyTorch 2.6 does not end with this on (pytorch/pytorch#145081)
    with torch._functorch.config.patch(ban_recompute_used_far_apart=False):
        got = torch.compile(criterion, fullgraph=True, backend="aot_eager")(a, target)
    want = criterion(b, target)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_autocast_gives_float32(name, dtype, device):
    hidden, W = torch.randn(4, 3), torch.randn(7, 3)
    target = torch.tensor([0, 6, 2, 2])
    with torch.autocast(autocasts(device), dtype=dtype):
        logits = hidden @ W.T
        got = spherical_loss(logits, target, CASES[name][0], prior=torch.arange(1.0, 8.0))
    want = spherical_loss(logits.float(), target, CASES[name][0], prior=torch.arange(1.0, 8.0))
    assert (logits.dtype, got.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(got, want)


def test_state_and_copies():
    criterion = softsphere.TaylorSoftmaxLoss(prior=torch.arange(1.0, 8.0))
    assert criterion.prior.sum() == 7
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other.prior, criterion.prior)
    assert "TaylorSoftmax()" in repr(criterion)


def test_predictions_follow_probabilities_not_outputs():
    criterion = softsphere.TaylorSoftmaxLoss()
    logits = torch.tensor([[0.5, -9.0, 0.0]])
    assert criterion.predict(logits).item() == 1
    top = criterion.topk(logits, 3)
    assert top.indices.tolist() == [[1, 0, 2]]
    torch.testing.assert_close(top.values.exp().sum(), torch.tensor(1.0))
    assert softsphere.SphericalLoss("z_loss").predict(logits).item() == 0


MARGINS = {
    "SoftMarginSoftmaxLoss": lambda: softsphere.SoftMarginSoftmaxLoss(margin=2.0),
    "SphericalLoss": lambda: softsphere.SphericalLoss(losses.SoftMarginSoftmax(2.0)),
    "LinearSphericalLoss": lambda: softsphere.LinearSphericalLoss(
        7, 7, losses.SoftMarginSoftmax(2.0), bias=False, dtype=torch.float64
    ),
}


@pytest.mark.parametrize("form", MARGINS)
def test_a_margin_is_for_training_in_every_form(form):
    logits, target = problem((5, 7))
    module = MARGINS[form]()
    if form == "LinearSphericalLoss":
        nn.init.eye_(module.weight)
    plain = nn.functional.cross_entropy(logits, target)
    assert module(logits, target) > plain + 0.1
    torch.testing.assert_close(module.eval()(logits, target), plain)


def test_an_assigned_loss_is_a_loss_or_refused():
    criterion = softsphere.SphericalLoss("softmax").eval()
    criterion.loss = "taylor_softmax"
    logits, target = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0])
    want = softsphere.TaylorSoftmaxLoss()(logits, target)
    assert torch.equal(criterion(logits, target), want)
    with pytest.raises(ValueError, match="loss must be one of"):
        criterion.loss = "taylor"
    assert torch.equal(criterion(logits, target), want)
