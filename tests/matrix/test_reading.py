"""Reading and comparing a factored weight, and shapes that do not fit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from _one_batch import D, backward, d, layer, rows, target
from softsphere import ClusteredLoss, FactoredSphericalLoss

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


@pytest.mark.once("a GPU asserts on its own")
@pytest.mark.parametrize("place", [-1, -100])
def test_a_negative_index_of_an_embedding_is_no_row(place):
    W = layer().weight
    for weight in (W, W.to_dense()):
        with pytest.raises(IndexError, match="out of range"):
            torch.nn.functional.embedding(torch.tensor([0, place]), weight)
        with pytest.raises(IndexError, match="out of range"):
            weight.index_select(0, torch.tensor([0, place]))


def in_clusters() -> torch.Tensor:
    """The weight of the leaves of a clustered layer."""
    assignment = torch.arange(D) % 2
    return ClusteredLoss(d, D, assignment, engine="factored").double().weight


@pytest.mark.parametrize("made", [lambda: layer().weight, in_clusters])
def test_rows_are_counted_from_the_end_as_well(made):
    W = made()
    dense, some = W.to_dense(), torch.tensor([[-1, 0], [-D, 3]])
    torch.testing.assert_close(W[some], dense[some])
    for columns in (torch.tensor([0, -1]), torch.tensor(-2), some.new_zeros(3, 1, 1)):
        torch.testing.assert_close(W[some, columns], dense[some, columns])
    torch.testing.assert_close(W.index_select(0, some[0, 1]), dense.index_select(0, some[0, 1]))
    with pytest.raises(IndexError, match="dim must be from -2 to 1, got 2"):
        W.index_select(2, some[0])


@pytest.mark.once("a GPU asserts on its own")
@pytest.mark.parametrize("place", [D, -D - 1])
@pytest.mark.parametrize("made", [lambda: layer().weight, in_clusters])
def test_an_index_of_no_row_is_refused(made, place):
    W = made()
    reads = {
        0: [lambda at: W.index_select(0, at), lambda at: torch.nn.functional.embedding(at, W)],
        -D: [lambda at: W[at]],
    }
    for least, calls in reads.items():
        for read in calls:
            with pytest.raises(IndexError, match=rf"got {place}, not in \[{least}, {D}\)"):
                read(torch.tensor([0, place]))


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


def test_inner_products():
    head = layer()
    backward(head)
    one = head.weight.grad.clone()
    (2 * head(2 * rows, target.flip(0))).backward()
    two = head.weight.grad
    want = (one.to_dense() * two.to_dense()).sum()
    torch.testing.assert_close(torch.dot(one, two), want)
    torch.testing.assert_close(torch.vdot(two, one), want)


def test_a_view_cannot_be_replaced():
    weight = FactoredSphericalLoss(3, 10).weight.detach()
    part, other = weight[:, :2], FactoredSphericalLoss(3, 10).weight.detach()[:, :2]
    before = weight.to_dense()
    with pytest.raises(TypeError, match="a view of a factored weight cannot be replaced"):
        part.data = other
    assert torch.equal(weight.to_dense(), before)


def test_a_part_is_copied_and_saved_as_its_numbers():
    head = layer()
    want = head.dense()
    row, bias = head.weight.detach()[3], head.bias.detach()
    file = io.BytesIO()
    torch.save({"bias": bias}, file)
    backward(head)
    for copied, index in ((copy.deepcopy(row), 3), (pickle.loads(pickle.dumps(row)), 3)):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, want[index])
    file.seek(0)
    assert torch.equal(torch.load(file)["bias"], want[:, -1])
    with pytest.raises(RuntimeError, match=r"copy part\.detach\(\)"):
        copy.deepcopy(head.bias)
    with pytest.raises(TypeError, match=r"part\.detach\(\)\.clone\(\)"):
        row.numpy()


# A transpose has D × w numbers, and is there for products alone.
TRANSPOSES = {
    "T": lambda W: W.T,
    "mT": lambda W: W.mT,
    "t": lambda W: W.t(),
    "transpose": lambda W: W.transpose(0, 1),
    "permute": lambda W: W.permute(1, 0),
}
OF_A_TRANSPOSE = {
    "clone": lambda x: x.clone(),
    "norm": lambda x: x.norm(),
    "product from the left": lambda x: x @ torch.ones(D, 2),
    "sum": lambda x: x + 0,
}


@pytest.mark.parametrize("read", OF_A_TRANSPOSE)
@pytest.mark.parametrize("make", TRANSPOSES)
def test_what_needs_all_numbers_of_a_transpose_is_refused_in_words(make, read):
    transpose = TRANSPOSES[make](layer().weight.detach())
    with pytest.raises(TypeError, match="not possible on the transpose of a factored weight"):
        OF_A_TRANSPOSE[read](transpose)


@pytest.mark.parametrize("make", TRANSPOSES)
def test_a_transpose_can_be_printed(make):
    weight = layer().weight.detach()
    assert repr(TRANSPOSES[make](weight)) == f"Part(shape={(d + 1, D)}, dtype=torch.float64)"
