"""FactoredTensor and StructuredGradient where tools and users come near what they cannot do."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref

import pytest
import torch
from torch import nn

from softsphere import FactoredSphericalLoss, SphericalLoss
from softsphere.matrix import FactoredTensor, SingularStepError, StructuredGradient
from softsphere.optim import FactoredSGD

d, D, m = 5, 23, 6
rows = torch.randn(m, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
target = torch.randint(D // 2, (m,), generator=torch.Generator().manual_seed(1))


def layer(**options):
    torch.manual_seed(0)
    return FactoredSphericalLoss(d, D, dtype=torch.float64, **options)


def backward(head, scale=1.0):
    head.zero_grad()
    (head(rows.to(head.weight.dtype), target) * scale).backward()


def with_momentum(head, steps=3, **options):
    optimizer = FactoredSGD(head.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})
    for _ in range(steps):
        backward(head)
        optimizer.step()
    return optimizer


# --- with a base measure: the parameter is diag(√π) [W b] ---------------------------------------


@pytest.fixture
def pair():
    """A head with a prior and the dense parameter that it is, under the same loss."""
    counts = torch.arange(1.0, D + 1).double()
    head = layer(prior=counts)
    dense = nn.Parameter(head.weight.to_dense())
    root = head.base_measure.sqrt().unsqueeze(1)
    criterion = SphericalLoss("taylor_softmax", prior=counts)
    H = nn.functional.pad(rows, (0, 1), value=1.0)
    return head, dense, lambda: criterion(H @ (dense / root).T, target)


CHANGES = {
    "scaled": lambda w: w.mul_(0.5),
    "shifted": lambda w: w.add_(0.25),
    "another added": lambda w: w.add_(torch.ones(1, w.shape[1]).double(), alpha=0.1),
    "lerp": lambda w: w.lerp_(torch.ones(w.shape).double(), 0.25),
    "filled": lambda w: w.fill_(0.3),
    "a row": lambda w: w[3].zero_(),
    "rows": lambda w: w.index_put_((torch.tensor([2, 5]),), torch.tensor(0.5).double()),
    "a column": lambda w: w[:, -1].fill_(0.1),
    "a clone": lambda w: w.copy_(w.clone() * 2),
    "tiny": lambda w: w.mul_(1e-200).add_(1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_written_is_written_into_the_scaled_weight(pair, change):
    head, dense, loss = pair
    with torch.no_grad():
        CHANGES[change](head.weight)
        CHANGES[change](dense)
    torch.testing.assert_close(head.weight.to_dense(), dense.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.weight.norm(), dense.norm())
    torch.testing.assert_close(head.weight[4:6].clone(), dense[4:6].detach())
    penalised = head(rows, target) + 0.1 * head.weight.norm() ** 2
    (loss() + 0.1 * dense.norm() ** 2).backward()
    penalised.backward()
    torch.testing.assert_close(head.weight.grad.to_dense(), dense.grad, rtol=1e-9, atol=1e-11)
    for each in (head.weight, dense):
        torch.optim.SGD([each], lr=0.3, weight_decay=0.1).step()
    torch.testing.assert_close(head.weight.to_dense(), dense.detach(), rtol=1e-10, atol=1e-10)


# --- moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["cpu", "float", "double"])
def test_a_move_keeps_hooks_attributes_and_views(move):
    head, seen = layer(), []
    head.weight.register_hook(lambda g: g * 0.25)
    head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    head.weight.mark = 7
    reference, row, parameter = weakref.ref(head.weight), head.weight[3], head.weight
    getattr(head, move)()
    assert head.weight is parameter is reference()
    assert head.weight.mark == 7
    backward(head)
    assert len(seen) == 1
    want = copy.deepcopy(head)
    (0.25 * want(rows.to(want.weight.dtype), target)).backward()
    torch.testing.assert_close(head.weight.grad.norm(), want.weight.grad.norm())
    assert row.clone().shape == (d + 1,)


def test_meta_layers_have_a_state():
    assert layer().to("meta").state_dict()["weight"].is_meta


# --- momentum beside the weight ------------------------------------------------------------------


@pytest.mark.parametrize("option", ["weight_decay", "momentum", "dampening", "lr"])
def test_an_option_that_is_no_number_is_refused_before_the_step(option):
    head = layer()
    optimizer = with_momentum(head, 0)
    optimizer.param_groups[0][option] = float("nan")
    before = head.dense()
    backward(head)
    with pytest.raises(ValueError, match=option.replace("lr", "learning rate")):
        optimizer.step()
    assert torch.equal(head.dense(), before)


def test_a_first_step_that_is_refused_begins_no_momentum():
    head, other = layer(), layer()
    optimizer = with_momentum(head, 0, dampening=0.5)
    backward(head, float("nan"))
    with pytest.raises(SingularStepError):
        optimizer.step()
    backward(head)
    optimizer.step()
    with_momentum(other, 1, dampening=0.5)
    torch.testing.assert_close(head.dense(), other.dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(d + 1, D), (d, D - 3), (d, D + 3)])
def test_momentum_of_another_layer_is_refused(shape):
    head, foreign = layer(), FactoredSphericalLoss(*shape, dtype=torch.float64)
    optimizer, state = with_momentum(head), FactoredSGD(foreign.parameters(), momentum=0.9)
    foreign(torch.zeros(1, shape[0]).double(), torch.tensor([0])).backward()
    state.step()
    optimizer.load_state_dict(state.state_dict())
    before = head.dense()
    backward(head)
    with pytest.raises(ValueError, match="the optimizer's state is that of another layer"):
        optimizer.step()
    assert torch.equal(head.dense(), before)


def test_a_multiple_of_the_momentum_is_not_one_of_the_weight():
    head = layer()
    buffer = with_momentum(head).state[head.weight]["momentum_buffer"]
    backward(head)
    for other in (buffer, buffer.clone(), 2 * buffer):
        with pytest.raises((TypeError, RuntimeError)), torch.no_grad():
            torch.add(head.weight.grad, other)


def test_pickle_with_bias_and_momentum():
    head = layer()
    with_momentum(head)
    other = pickle.loads(pickle.dumps(head))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.dense(), head.dense())
    assert torch.empty_like(head.weight).shape == head.weight.shape


def test_inference_mode_binds_nothing():
    head, other = layer(), layer()
    optimizers = [with_momentum(each) for each in (head, other)]
    state = copy.deepcopy(head.state_dict())
    with torch.inference_mode():
        head.load_state_dict(state)
        head.log_prob(rows)
    other.load_state_dict(state)
    for each, optimizer in zip((head, other), optimizers, strict=True):
        backward(each)
        optimizer.step()
    torch.testing.assert_close(head.dense(), other.dense(), rtol=1e-12, atol=1e-12)


def test_a_weight_without_its_optimizer_lets_go_of_the_momentum():
    head = layer()
    optimizer = with_momentum(head)
    assert head.matrix.arrays.blocks == 2
    del optimizer
    gc.collect()
    with_momentum(head, 1, momentum=0.0)
    assert head.matrix.arrays.blocks == 1


# --- shapes, reading and comparing ---------------------------------------------------------------

DO_NOT_FIT = {
    "add_": lambda w: w.add_(torch.ones(D + 4, d + 1).double()),
    "copy_": lambda w: w.copy_(torch.ones(D + 4, d + 1).double()),
    "lerp_": lambda w: w.lerp_(torch.ones(D + 4, d + 1).double(), 0.5),
    "another head's": lambda w: w.copy_(FactoredSphericalLoss(d, D + 4).double().weight),
    "mm": lambda w: torch.ones(2, D + 4).double() @ w,
    "outputs": lambda w: torch.ones(2, d).double() @ w.T,
}


@pytest.mark.parametrize("call", DO_NOT_FIT)
def test_shapes_that_do_not_fit_are_refused(call):
    head = layer()
    before = head.dense()
    with pytest.raises(RuntimeError), torch.no_grad():
        DO_NOT_FIT[call](head.weight)
    assert torch.equal(head.dense(), before)


def test_masks_and_comparisons():
    W = layer().weight.detach()
    dense = W.to_dense()
    mask = torch.arange(D) % 3 == 0
    assert torch.equal(W[mask], dense[mask])
    with pytest.raises(TypeError, match="to_dense"):
        W[dense > 0]
    assert torch.equal(W == 0, dense == 0)
    assert torch.equal(W > 0.1, dense > 0.1)
    with pytest.raises(TypeError, match=r"aten\.eq"):
        W.clone() == W  # noqa: B015
    assert not W.isnan().any()
    assert W.mul_(torch.inf).isnan().sum() == (dense * torch.inf).isnan().sum()


def test_a_change_without_a_version_is_noticed():
    head = layer()
    state = head.state_dict()
    head(rows, target)  # Q is known
    state["weight"].data.mul_(1.5)
    linear = head.to_linear()
    want = SphericalLoss("taylor_softmax")(linear(rows), target)
    torch.testing.assert_close(head(rows, target), want)


# --- gradients -----------------------------------------------------------------------------------


def test_a_gradient_of_another_weight_is_refused():
    one, two = layer(), layer()
    backward(one)
    two.weight.grad = one.weight.grad
    before = two.dense()
    with pytest.raises(RuntimeError, match="another weight"):
        torch.optim.SGD(two.parameters(), lr=0.1).step()
    backward(two)
    with pytest.raises(RuntimeError, match="another weight"):
        torch.add(one.weight.grad, two.weight.grad)
    assert torch.equal(two.dense(), before)


def test_inner_products():
    head = layer()
    backward(head)
    one = head.weight.grad.clone()
    (2 * head(2 * rows, target.flip(0))).backward()
    two = head.weight.grad
    want = (one.to_dense() * two.to_dense()).sum()
    torch.testing.assert_close(torch.dot(one, two), want)
    torch.testing.assert_close(torch.vdot(two, one), want)


def test_a_gradient_is_not_pickled():
    head = layer()
    backward(head)
    assert isinstance(head.weight.grad, StructuredGradient)
    with pytest.raises(TypeError, match="means nothing without its weight"):
        pickle.dumps(head.weight.grad)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_anomaly_detection():
    with torch.autograd.detect_anomaly(check_nan=True):
        backward(layer())


class Kept(torch.optim.AdamW):
    """An optimizer of somebody's own."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Kept])
def test_a_closure_does_not_hide_the_gradient_from_the_question(kind):
    head, trunk = layer(), nn.Linear(d, d).double()
    optimizer = kind([{"params": trunk.parameters()}, {"params": head.parameters()}])

    def closure():
        loss = head(trunk(rows), target)
        loss.backward()
        return loss

    before = trunk.weight.detach().clone()
    with pytest.raises(TypeError, match="cannot step a factored weight"):
        optimizer.step(closure)
    assert torch.equal(trunk.weight, before)


# --- other processes -----------------------------------------------------------------------------


def shifted(head, queue):
    """In another process: changes what came, and sends back what it is."""
    with torch.no_grad():
        head.weight.add_(1.0)
    queue.put(head.dense().sum().item())


def test_another_process_gets_a_copy():
    head = layer()
    before = head.dense()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=shifted, args=(head, queue))
    process.start()
    total = queue.get(timeout=60)
    process.join(timeout=60)
    assert total == pytest.approx(float(before.sum()) + before.numel())
    assert torch.equal(head.dense(), before)
    backward(head)
    torch.optim.SGD(head.parameters(), lr=0.1).step()


def test_shallow_copies_are_the_same_weight():
    head = layer()
    other = copy.copy(head.weight)
    with torch.no_grad():
        other.mul_(2)
    assert torch.equal(head.weight, other)
    assert isinstance(other, FactoredTensor)


def test_a_whole_model_is_saved_with_less_than_two_copies():
    head = layer()
    buffer = io.BytesIO()
    torch.save(head, buffer)
    assert buffer.tell() < 2 * head.weight.numel() * 8 + 20_000
