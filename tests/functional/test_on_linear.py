"""The loss of a linear layer: transforms, moves, prediction, and changes inside accumulate()."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from _devices import autocasts
from softsphere import FactoredSphericalLoss, LinearSphericalLoss, LinearSphericalOptions
from softsphere.functional import linear_spherical_loss, spherical_loss
from softsphere.targets import from_sparse

d, D = 6, 50
GRAM = LinearSphericalOptions(engine="gram")
t = torch.tensor([1, 5, 5, 49])


def layer(name="taylor_softmax", engine="gram", dtype=torch.float64, **options):
    torch.manual_seed(0)
    chosen = LinearSphericalOptions(engine=engine)
    return LinearSphericalLoss(d, D, name, options=chosen, dtype=dtype, **options)


def rows(m=4, dtype=torch.float64):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_forward_mode_is_that_of_the_logits_or_refused():
    h = rows()
    want = torch.func.jvp(lambda x: layer(engine="dense")(x, t), (h,), (torch.ones_like(h),))[1]
    got = torch.func.jvp(lambda x: layer(engine="auto")(x, t), (h,), (torch.ones_like(h),))[1]
    assert got == want != 0
    for engine in ("gram", "chunked"):
        with pytest.raises(RuntimeError, match="engine='dense'"):
            torch.func.jvp(lambda x, e=engine: layer(engine=e)(x, t), (h,), (torch.ones_like(h),))


def test_per_sample_gradients_by_auto():
    head = layer(engine="auto")
    W = {name: x.detach() for name, x in head.named_parameters()}

    def one(W, h, t):
        return torch.func.functional_call(head, W, (h.unsqueeze(0), t.unsqueeze(0)))

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(W, rows(), t)
    head(rows(), t).backward()
    torch.testing.assert_close(each["weight"].mean(0), head.weight.grad)


def twice(head, hidden):
    (by_hidden,) = torch.autograd.grad(head(hidden, t), hidden, create_graph=True)
    by_hidden.sum().backward()


DERIVATIVES = {
    "second": twice,
    "grad": lambda head, h: torch.func.grad(lambda x: head(x, t))(h.detach()),
    "vmap": lambda head, h: torch.func.vmap(lambda x: head(x, t))(h.detach().expand(2, *h.shape)),
}


@pytest.mark.parametrize("engine", ["chunked", "gram"])
@pytest.mark.parametrize("way", DERIVATIVES)
def test_what_an_engine_cannot_differentiate_names_the_one_that_can(engine, way):
    with pytest.raises(RuntimeError, match=r"engine=.dense."):
        DERIVATIVES[way](layer(engine=engine), rows().requires_grad_())


@pytest.mark.parametrize("dynamic", [None, True])
def test_auto_compiles_for_rows_that_vary(dynamic):
    head = layer(engine="auto")
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (4, 3, 2):
        torch.testing.assert_close(compiled(rows(m), t[:m]), head(rows(m), t[:m]))


@pytest.mark.parametrize("kind", [LinearSphericalLoss, FactoredSphericalLoss])
def test_prediction_has_the_same_digits_under_autocast(kind, device):
    torch.manual_seed(0)
    head, h = kind(64, 500), torch.randn(20, 64)
    t = torch.randint(500, (20,))
    with torch.autocast(autocasts(device), torch.bfloat16):
        inside = head.log_prob(h), head.topk(h, 3), head.rank(h, t)
    assert torch.equal(inside[0], head.log_prob(h))
    assert torch.equal(inside[1].indices, head.topk(h, 3).indices)
    assert torch.equal(inside[2], head.rank(h, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_prior_keeps_its_digits_when_the_layer_moves(dtype):
    counts = torch.ones(100_000)
    counts[0] = 1e9
    head = LinearSphericalLoss(2, 100_000, prior=counts, dtype=torch.float32).to(dtype)
    pi = head.prior.double()
    assert head.prior.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert pi.isfinite().all() and (pi > 0).all()
    assert float(pi.sum()) == pytest.approx(100_000, rel=1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("engine", ["dense", "chunked", "gram"])
@pytest.mark.parametrize("name", ["z_loss", "bohning_bound", "bouchard_bound"])
def test_an_overflow_does_not_look_like_a_loss(name, engine):
    head = layer(name, engine, dtype=torch.float32)
    with torch.no_grad():
        head.weight[3] = torch.nan
    assert not head(rows(dtype=torch.float32), t).isfinite()


def test_the_state_of_a_factored_layer_is_a_state_of_this_one():
    factored = FactoredSphericalLoss(d, D, dtype=torch.float64)
    head = layer()
    head.load_state_dict(factored.state_dict())
    torch.testing.assert_close(head(rows(), t), factored(rows(), t))


def test_many_targets_a_row_need_no_table_of_pairs():
    target = torch.randint(1000, (3, 5000))
    values = torch.rand(3, 5000, dtype=torch.float64)
    entries = from_sparse(target, values, 1000, -100)
    for row in range(3):
        want = torch.zeros(1000, dtype=torch.float64).index_add_(0, target[row], values[row])
        got = torch.zeros(1000, dtype=torch.float64)
        kept = entries.y[row] != 0
        assert entries.t[row][kept].unique().numel() == int(kept.sum())
        got[entries.t[row][kept]] = entries.y[row][kept]
        torch.testing.assert_close(got, want)


def replaced(head):
    head.weight = nn.Parameter(3 * head.weight.detach())
    head(rows(), t)


def with_new_prior(head):
    head.prior.copy_(head.prior.flip(0))
    head(rows(), t)


def fused(head):
    optimizer = torch.optim.AdamW(head.parameters(), lr=1.0, fused=True)
    for x in head.parameters():
        x.grad = torch.ones_like(x)
    head(rows(), t).backward()
    optimizer.step()


def called(head):
    W = {name: 2 * x.detach() for name, x in head.named_parameters()}
    torch.func.functional_call(head, W, (rows(), t))


@pytest.mark.parametrize("change", [replaced, with_new_prior, fused, called])
def test_a_change_inside_accumulate_is_told(change):
    head = layer(prior=torch.rand(D) + 0.1)

    def use():
        with head.accumulate():
            head(rows(), t)
            change(head)

    with pytest.raises(RuntimeError, match=r"changed inside|replaced after|pending inside"):
        use()


def test_a_copy_is_not_in_the_middle_of_anything():
    head = layer()
    with head.accumulate():
        head(rows(), t)
        other, again = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    with torch.no_grad():
        for x in (other, again):
            x.weight.mul_(2)
            assert x.accumulation is None
            x(rows(), t)


def test_accumulation_onto_the_sparse_gradient_of_a_tied_embedding():
    grads = []
    for inside in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(D, d, sparse=True)
        head = LinearSphericalLoss.from_linear(embedding, options=GRAM)

        def step(head=head, embedding=embedding):
            head(embedding(t), t).backward()

        if inside:
            with head.accumulate():
                step()
        else:
            step()
        grads.append(head.weight.grad.to_dense())
    torch.testing.assert_close(*grads)


# the compiler looks at .grad of what it goes on with
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_layer_accumulates():
    head, plain = layer(), layer()
    plain(rows(), t).backward()
    compiled = torch.compile(head, backend="aot_eager")
    with head.accumulate():
        compiled(rows(), t).backward()
    torch.testing.assert_close(head.weight.grad, plain.weight.grad)


def test_dtypes_must_agree_inside_accumulate_as_outside():
    head = layer(dtype=torch.float32)
    with pytest.raises(TypeError, match="dtype of hidden"), head.accumulate():
        head(rows(), t)


def test_sparse_targets_of_the_linear_form_are_those_of_the_logits():
    W, h = torch.randn(D, d, dtype=torch.float64), rows()
    target, values = torch.tensor([[1, 1, 7], [3, -1, 3]] * 2), torch.rand(4, 3).double()
    got = linear_spherical_loss(h, W, target, "squared_error", target_values=values, options=GRAM)
    want = spherical_loss(h @ W.T, target, "squared_error", target_values=values)
    torch.testing.assert_close(got, want)
