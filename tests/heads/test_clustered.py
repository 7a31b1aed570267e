"""Clustered layers: the loss, its gradients and the predictions against the explicit definition."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from _clustered import ASSIGNMENTS, COUNTS, LEAVES, MIXED, D, d, layer, probabilities, rows
from _devices import autocasts
from softsphere import ClusteredLoss, losses
from softsphere.clusters import Clusters
from softsphere.engines import grouped_products
from softsphere.functional import on_leaves

M = 33
TARGET = torch.randint(D, (M,), generator=torch.Generator().manual_seed(2))
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SPHERICAL = ("taylor_softmax", "spherical_softmax")
# What the layer is made with, for every way in which its leaves are computed.
WAYS = {
    "auto": {},
    "logits": {"engine": "logits"},
    "sparse": {"sparse": True},
    "gram": {"engine": "gram"},
    "factored": {"engine": "factored"},
    "factored without bias": {"engine": "factored", "bias": False},
    "factored and projected": {"engine": "factored", "leaf_features": 3},
    "projected": {"leaf_features": 3},
    "without bias": {"bias": False},
}

every_assignment = pytest.mark.parametrize("name", ASSIGNMENTS)
# every leaf with every assignment, and every way with the leaves that have it
CASES = [(name, leaf, "auto") for name in ASSIGNMENTS for leaf in LEAVES] + [
    (name, leaf, way)
    for name in ("mixed", "empty clusters", "one cluster", "all shortlist")
    for leaf in ("taylor_softmax", "spherical_softmax", "softmax")
    for way in WAYS
    if way != "auto" and (way[:4] not in ("gram", "fact") or leaf in SPHERICAL)
]
every_case = pytest.mark.parametrize(("name", "leaf", "way"), CASES)


@pytest.fixture(params=["pairs", "tiles"])
def products(request, monkeypatch):
    """Both ways to multiply rows with the leaves of their clusters."""
    rows_at_least = 0 if request.param == "tiles" else 10**9
    monkeypatch.setattr(grouped_products, "_MANY_ROWS", rows_at_least)


@every_case
def test_loss_is_the_negative_log_probability_of_the_definition(name, leaf, way, products):
    head = layer(ASSIGNMENTS[name], leaf, **WAYS[way]).eval()
    p = probabilities(head, leaf, rows(M))
    want = -p.gather(1, TARGET.unsqueeze(1)).squeeze(1).log()
    head.reduction = "none"
    torch.testing.assert_close(head(rows(M), TARGET), want, **CLOSE)


@pytest.mark.parametrize(
    ("leaf", "way"),
    [(leaf, "auto") for leaf in LEAVES] + [(leaf, "factored") for leaf in SPHERICAL],
)
@every_assignment
def test_probabilities_are_those_of_the_definition_and_sum_to_one(name, leaf, way):
    head = layer(ASSIGNMENTS[name], leaf, **WAYS[way])
    want = probabilities(head, leaf, rows(4)).log()
    recorded = head.log_prob(rows(4))
    with torch.no_grad():
        in_chunks = head.log_prob(rows(4))
    for found in (recorded, in_chunks):
        torch.testing.assert_close(found, want, **CLOSE)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(4).double(), **CLOSE)


@pytest.mark.parametrize("engine", ["logits", "gram"])
def test_gradients_of_each_row_by_jacrev(engine):
    head, hidden = layer(MIXED, engine=engine, reduction="none"), rows(M)
    named = dict(head.named_parameters())
    every = torch.func.jacrev(lambda p: torch.func.functional_call(head, p, (hidden, TARGET)))(
        named
    )
    for i, loss in enumerate(head(hidden, TARGET)):
        one = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        for name, x in zip(named, one, strict=True):
            torch.testing.assert_close(every[name][i], x)


@every_case
def test_gradients_are_those_of_log_prob(name, leaf, way, products):
    head = layer(ASSIGNMENTS[name], leaf, **WAYS[way]).eval()
    hidden = rows(M).requires_grad_()
    given = [hidden, *head.parameters()]
    mean = -head.log_prob(hidden).gather(1, TARGET.unsqueeze(1)).mean()
    # without a class in a cluster there is nothing to use
    want = torch.autograd.grad(mean, given, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(head(hidden, TARGET), given)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x.to_dense(), y.to_dense(), **CLOSE)


@pytest.mark.parametrize(
    ("leaf", "way"),
    [(leaf, "projected") for leaf in LEAVES] + [(leaf, "gram") for leaf in SPHERICAL],
)
def test_gradcheck(leaf, way, products):
    head = layer(MIXED, leaf, **WAYS[way])
    target = TARGET[:7]

    def loss(hidden, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(head, named, (hidden, target))

    names, parameters = zip(*head.named_parameters(), strict=True)
    inputs = [x.detach().clone().requires_grad_() for x in (rows(7), *parameters)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@every_assignment
def test_permuting_the_classes_changes_nothing(name):
    order = torch.randperm(D, generator=torch.Generator().manual_seed(5))
    head = layer(ASSIGNMENTS[name])
    other = layer(ASSIGNMENTS[name][order], counts=COUNTS[order])
    of_class = torch.empty(D, dtype=torch.long)
    of_class[order] = torch.arange(D)
    with torch.no_grad():
        S = len(head.grouping.shortlist)
        shortlist = of_class[head.grouping.shortlist]
        leaves = of_class[head.grouping.leaves]
        for mine, its, at in (
            (head.root.weight[:S], other.root.weight, other.grouping.place[shortlist]),
            (head.root.bias[:S], other.root.bias, other.grouping.place[shortlist]),
            (head.weight, other.weight, other.grouping.place[leaves]),
            (head.bias, other.bias, other.grouping.place[leaves]),
        ):
            its[at] = mine
        other.root.weight[S:], other.root.bias[S:] = head.root.weight[S:], head.root.bias[S:]
    torch.testing.assert_close(
        other(rows(M), of_class[TARGET]), head(rows(M), TARGET), rtol=1e-13, atol=1e-13
    )
    found, want = other.log_prob(rows(4)), head.log_prob(rows(4))
    torch.testing.assert_close(found, want[:, order], **CLOSE)
    assert torch.equal(of_class[head.predict(rows(M))], other.predict(rows(M)))


def test_all_shortlist_is_softmax():
    head = layer(ASSIGNMENTS["all shortlist"])
    logits = torch.nn.functional.linear(rows(M), head.root.weight, head.root.bias)
    want = torch.nn.functional.cross_entropy(logits, TARGET)
    torch.testing.assert_close(head(rows(M), TARGET), want, **CLOSE)


def test_begins_with_the_frequencies():
    for assignment in ASSIGNMENTS.values():
        head = ClusteredLoss(d, D, assignment, counts=COUNTS, dtype=torch.float64)
        p = head.log_prob(torch.zeros(1, d, dtype=torch.float64)).exp().squeeze(0)
        torch.testing.assert_close(p, COUNTS.double() / COUNTS.sum(), **CLOSE)


def test_a_class_without_any_counts_like_the_rarest():
    counts = COUNTS.clone()
    counts[7], counts[8] = 0, counts.min()
    same = torch.where(counts == 0, counts[counts > 0].min(), counts)
    one, other = (ClusteredLoss(d, D, MIXED, counts=x) for x in (counts, same))
    assert torch.equal(one.prior, other.prior)
    assert torch.equal(one.root_shares, other.root_shares)


def test_counts_of_one_are_no_counts():
    head = ClusteredLoss(d, D, MIXED, dtype=torch.float64)
    p = head.log_prob(torch.zeros(1, d, dtype=torch.float64)).exp()
    torch.testing.assert_close(p, torch.full((1, D), 1 / D, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("way", ["auto", "sparse", "gram", "factored"])
def test_ignored_rows_have_no_loss_and_no_gradient(way):
    head = layer(MIXED, **WAYS[way])
    target = TARGET.clone()
    target[::3] = -100
    hidden, kept = rows(M).requires_grad_(), target >= 0
    head(hidden, target).backward()
    grads = [x.grad.to_dense() for x in head.parameters()]
    assert not hidden.grad[~kept].any()
    head.zero_grad()
    loss = head(rows(M)[kept], target[kept])
    torch.testing.assert_close(loss, head(hidden, target), **CLOSE)
    loss.backward()
    for x, y in zip(head.parameters(), grads, strict=True):
        torch.testing.assert_close(x.grad.to_dense(), y, **CLOSE)


@pytest.mark.parametrize("way", ["auto", "sparse", "gram", "factored"])
def test_batches_without_rows_or_within_one_cluster(way):
    head = layer(MIXED, **WAYS[way])
    whole = torch.full((4,), -100)
    assert head(rows(4), whole).isnan()
    head.reduction = "sum"
    for target in (whole[:0], whole, torch.full((4,), int(head.grouping.leaves[0]))):
        hidden = rows(len(target)).requires_grad_()
        head(hidden, target).backward()
        assert hidden.grad.isfinite().all()
        assert hidden.grad.any() == (len(target) > 0 and int(target[0]) >= 0)


def test_reductions_and_leading_shapes():
    head = layer(MIXED)
    head.reduction = "none"
    each = head(rows(12).view(3, 4, d), TARGET[:12].view(3, 4))
    assert each.shape == (3, 4)
    for reduction in ("mean", "sum"):
        head.reduction = reduction
        value = head(rows(12), TARGET[:12].int())
        torch.testing.assert_close(value, getattr(each, reduction)(), **CLOSE)


def test_many_pairs_are_computed_in_parts(monkeypatch):
    head = layer(MIXED, engine="logits")
    hidden = rows(M).requires_grad_()
    want = torch.autograd.grad(head(hidden, TARGET), [hidden, *head.parameters()])
    seen = []
    by_outputs = on_leaves._by_outputs

    def spy(loss, Z, leaves, group, sparse):
        seen.append(group.pairs)
        return by_outputs(loss, Z, leaves, group, sparse)

    monkeypatch.setattr(on_leaves, "_by_outputs", spy)
    monkeypatch.setattr(on_leaves, "_PAIRS", 20)
    found = torch.autograd.grad(head(hidden, TARGET), [hidden, *head.parameters()])
    # each part has at most that many pairs more than one row of the largest cluster
    assert len(seen) > 4
    assert max(seen) <= 20 + head.grouping.largest
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("options", [{"engine": "logits"}, {"leaf": "softmax"}, {"sparse": True}])
def test_gradients_of_parts_are_added_before_they_are_rounded(options, monkeypatch):
    """In half precision many parts have no larger errors than one."""
    torch.manual_seed(0)
    head = ClusteredLoss(d, 20, torch.arange(20) % 2, reduction="sum", **options).bfloat16()
    hidden, target = rows(2000, dtype=torch.bfloat16) + 0.5, torch.arange(2000) % 20

    def gradients(head, hidden):
        head.zero_grad()
        head(hidden, target).backward()
        return {name: head.get_parameter(name).grad.to_dense() for name in ("weight", "bias")}

    want = gradients(copy.deepcopy(head).double(), hidden.double())

    def errors():
        found = gradients(head, hidden)
        return {name: (found[name] - want[name]).norm() / want[name].norm() for name in want}

    of_one = errors()
    monkeypatch.setattr(on_leaves, "_PAIRS", 100)
    for name, error in errors().items():
        assert error <= 2 * of_one[name]


def test_parts_have_one_sparse_gradient(monkeypatch):
    """Of the leaves of the clusters with rows, each once."""
    head = ClusteredLoss(d, 30, torch.arange(30) % 3, sparse=True)
    monkeypatch.setattr(on_leaves, "_PAIRS", 20)
    head(rows(40, dtype=torch.float32), torch.arange(40) % 3 % 2).backward()
    assert head.weight.grad._nnz() == 20


def test_second_derivatives_of_sparse_gradients_of_parts_are_refused(monkeypatch):
    head = ClusteredLoss(d, 30, torch.arange(30) % 3, sparse=True)
    monkeypatch.setattr(on_leaves, "_PAIRS", 20)
    hidden = rows(40, dtype=torch.float32).requires_grad_()
    loss = head(hidden, torch.arange(40) % 30)
    with pytest.raises(RuntimeError, match="the gradient of weight is sparse"):
        torch.autograd.grad(loss, [hidden, head.weight], create_graph=True)


def test_parts_have_gradients_in_transforms(monkeypatch):
    head, hidden = layer(MIXED, engine="logits"), rows(M)
    want = torch.func.jacrev(lambda h: head(h, TARGET))(hidden)
    monkeypatch.setattr(on_leaves, "_PAIRS", 20)
    torch.testing.assert_close(torch.func.jacrev(lambda h: head(h, TARGET))(hidden), want, **CLOSE)


@pytest.mark.parametrize("mapped", ["weight", "bias"])
@pytest.mark.parametrize("options", [{"engine": "logits"}, {"leaf": "softmax"}, {"engine": "gram"}])
def test_vmap_over_one_parameter_of_the_leaves(options, mapped):
    head, hidden = layer(MIXED, **options), rows(M)
    parameters = {name: p.detach() for name, p in head.named_parameters()}

    def value(x):
        return torch.func.functional_call(head, parameters | {mapped: x}, (hidden, TARGET))

    several = torch.stack([parameters[mapped] + shift for shift in (0.0, 0.1, -0.2)])
    want = torch.stack([value(x) for x in several])
    torch.testing.assert_close(torch.vmap(value)(several), want, **CLOSE)


@pytest.mark.once("lost digits are noticed on a CPU alone")
def test_auto_leaves_a_gram_matrix_that_has_lost_its_digits():
    """Two columns of the weight take each other off, and leave little of q."""
    far = layer(MIXED, engine="logits", dtype=torch.float32)
    with torch.no_grad():
        far.weight[:, 0] += 3000 * torch.randn(len(far.weight))
        far.weight[:, 1] = -far.weight[:, 0] + 1e-3 * far.weight[:, 1]
    hidden = rows(2000, dtype=torch.float32)
    hidden[:, 1] = hidden[:, 0]
    target = torch.randint(D, (2000,))
    want = copy.deepcopy(far).double()(hidden.double(), target)
    named, auto = copy.deepcopy(far), copy.deepcopy(far)
    named.engine, auto.engine = "gram", "auto"
    error = torch.finfo(torch.float32).eps * 3000 * 4
    assert abs(auto(hidden, target) - want) < error
    assert abs(named(hidden, target) - want) > 10 * error


@pytest.mark.parametrize(
    ("leaf", "way"),
    [(leaf, "auto") for leaf in LEAVES] + [(leaf, "factored") for leaf in SPHERICAL],
)
@every_assignment
def test_predictions_are_those_of_log_prob(name, leaf, way):
    head = layer(ASSIGNMENTS[name], leaf, **WAYS[way])
    log_p = head.log_prob(rows(M))
    values, indices = log_p.topk(6)
    best = head.topk(rows(M), 6)
    torch.testing.assert_close(best.values, values, **CLOSE)
    assert torch.equal(best.indices, indices)
    assert torch.equal(head.predict(rows(M)), log_p.argmax(1))
    some = torch.tensor([D - 1, 3, 3, 0])
    torch.testing.assert_close(head.log_prob(rows(M), some), log_p[:, some], **CLOSE)
    assert head.log_prob(rows(M), some[:0]).shape == (M, 0)
    above = log_p > log_p.gather(1, TARGET.unsqueeze(1))
    assert torch.equal(head.rank(rows(M), TARGET), above.sum(1) + 1)


@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_equal_classes_of_a_cluster_rank_alike(engine):
    head = layer(torch.arange(D) // 8 - 1, counts=None, engine=engine)
    first = int(head.grouping.starts[2])
    state = {name: x.clone() for name, x in head.state_dict().items()}
    for name in ("weight", "bias"):
        state[name][first : first + 8] = state[name][first].clone()
    head.load_state_dict(state)
    # so that factored rows are written in two ways
    optimizer = torch.optim.SGD([head.weight], lr=1.0)
    for cluster in (1, 3):
        head.zero_grad()
        own = head.grouping.leaves[head.grouping.starts[cluster] :][:6]
        head(rows(6), own).backward()
        optimizer.step()
    classes = head.grouping.leaves[first : first + 8]
    ranks = torch.stack([head.rank(rows(M), k.expand(M)) for k in classes])
    assert (ranks == ranks[0]).all()


@pytest.mark.parametrize("engine", ["auto", "factored"])
@pytest.mark.parametrize("width", [d, 3])
def test_rows_are_copied_in_the_order_of_the_classes(width, engine):
    head = layer(MIXED, leaf_features=None if width == d else width, engine=engine)
    bias = head.state_dict()["bias"].clone()
    rows_of_classes, before = torch.randn(D, width), head.root.weight.clone()
    head.copy_rows(rows_of_classes)
    S = len(head.grouping.shortlist)
    state = head.state_dict()
    assert torch.equal(state["weight"], rows_of_classes[head.grouping.leaves].double())
    assert torch.equal(state["bias"], bias)
    if width == d:
        before[:S] = rows_of_classes[MIXED < 0]
    assert torch.equal(head.root.weight, before)
    with pytest.raises(ValueError, match=rf"rows must have shape \({D}, {width}\)"):
        head.copy_rows(rows_of_classes[1:])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_rows_are_those_of_the_weight_and_take_gradients(name, sparse):
    """They can serve as input embeddings that are tied to the layer."""
    assignment = ASSIGNMENTS[name]
    head = layer(assignment, sparse=sparse)
    table = torch.randn(D, d, dtype=torch.float64)
    head.copy_rows(table)
    wanted = torch.randint(D, (3, 4))
    wanted[0, 0] = wanted[1, 1]
    found = head.rows(wanted.int())
    assert torch.equal(found, table[wanted])
    assert head.rows(wanted[:, :0]).shape == (3, 0, d)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    want = torch.zeros_like(table).index_put((wanted,), upstream, accumulate=True)
    grouping = head.grouping
    of_root = head.root.weight.grad[: len(grouping.shortlist)]
    torch.testing.assert_close(of_root, want[grouping.shortlist])
    grad = head.weight.grad
    assert grad.is_sparse == sparse
    torch.testing.assert_close(grad.to_dense(), want[grouping.leaves])
    if sparse:
        touched = wanted[assignment[wanted] >= 0].unique()
        assert len(grad.coalesce().indices()[0]) == len(touched)


@pytest.mark.parametrize(
    ("options", "classes", "words"),
    [
        ({"leaf_features": 3}, torch.tensor([0]), "without leaf_features to tie its rows"),
        ({"engine": "factored"}, torch.tensor([0]), "the rows of a factored weight cannot be tied"),
        ({}, torch.tensor([0.0]), "classes must be a tensor of class indices"),
        ({}, torch.tensor([0], device="meta"), "classes must be on the device of weight"),
    ],
)
def test_rows_that_cannot_be_tied_are_refused(options, classes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        layer(MIXED, **options).rows(classes)


@pytest.mark.once("a GPU ends with an error of its own, since no value is looked at there")
def test_rows_of_no_class_are_refused():
    for classes, words in (([0, D], f"got {D}"), ([-1], "got -1; leave out rows")):
        with pytest.raises(ValueError, match=rf"classes must be in \[0, {D}\), {words}"):
            layer(MIXED).rows(torch.tensor(classes))


@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_state_dict_and_copies(engine):
    head = layer(MIXED, leaf_features=3, engine=engine)
    assert set(head.state_dict()) == {
        *("root.weight", "root.bias", "project.weight", "weight", "bias"),
        *("assignment", "prior", "root_shares"),
    }
    want = head(rows(M), TARGET)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other = ClusteredLoss(d, D, MIXED, leaf_features=3, engine=engine, dtype=torch.float64)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for same in (other, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        torch.testing.assert_close(same(rows(M), TARGET), want, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_another_assignment_is_not_loaded(engine):
    state = layer(MIXED, engine=engine).state_dict()
    other = layer(MIXED.roll(1), engine=engine)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="assignment is not the one that the layer was made"):
        other.load_state_dict(state)
    torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_rows_in_the_order_of_the_classes_are_not_loaded_as_those_of_clusters(engine):
    state = torch.nn.Linear(d, D).double().state_dict()
    head = layer(ASSIGNMENTS["no shortlist"], engine=engine)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight has no assignment beside it.*copy_rows\(\)"):
        head.load_state_dict(state, strict=False)
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)
    head.load_state_dict({k: x for k, x in before.items() if k != "assignment"}, strict=False)
    in_order = layer(torch.arange(D) // 10, engine=engine)
    in_order.load_state_dict(state, strict=False)
    assert torch.equal(in_order.state_dict()["weight"], state["weight"])


@pytest.mark.once("it names its devices")
@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_made_on_the_meta_device(engine):
    made = {"counts": COUNTS, "engine": engine, "device": "meta", "dtype": torch.float64}
    head = ClusteredLoss(d, D, MIXED, **made)
    head = head.to_empty(device="cpu")
    want = layer(MIXED, engine=engine)
    head.load_state_dict(want.state_dict())
    torch.testing.assert_close(head(rows(M), TARGET), want(rows(M), TARGET), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, products):
    head = layer(MIXED).to(dtype)
    assert head.prior.dtype == torch.float64
    wide = layer(MIXED)
    with torch.no_grad():
        for x, y in zip(wide.parameters(), head.parameters(), strict=True):
            x.copy_(y)
    hidden = rows(M, dtype=dtype)
    # the logits of the root are rounded as those of F.linear
    error = 4 * torch.finfo(dtype).eps
    want = wide(hidden.double(), TARGET)
    torch.testing.assert_close(head(hidden, TARGET).double(), want, rtol=error, atol=error)
    head(hidden, TARGET).backward()
    assert head.weight.grad.dtype == dtype


def test_autocast(device):
    head = layer(MIXED, dtype=torch.float32)
    hidden = rows(M, dtype=torch.float32)
    with torch.autocast(autocasts(device), torch.bfloat16):
        found = head(hidden.bfloat16(), TARGET)
    assert found.dtype == torch.float32
    error = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found, head(hidden, TARGET), rtol=error, atol=error)


def test_sparse_gradient_has_the_rows_of_the_clusters_with_targets():
    head = layer(MIXED, sparse=True)
    cluster = head.grouping.cluster_of_leaf
    target = head.grouping.leaves[(cluster == 1) | (cluster == 4)][:5]
    head(rows(5), target).backward()
    grad = head.weight.grad
    assert grad.is_sparse
    wanted = torch.isin(cluster, cluster[head.grouping.place[target]]).nonzero().squeeze(1)
    assert torch.equal(grad.coalesce().indices().squeeze(0), wanted)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    dense = layer(MIXED)
    dense(rows(5), target).backward()
    torch.optim.SGD(dense.parameters(), lr=0.1).step()
    optimizer.step()
    torch.testing.assert_close(head.weight, dense.weight, **CLOSE)


def test_compiles_around_the_layer():
    head = layer(MIXED)
    model = torch.nn.Sequential(torch.nn.Linear(d, d, dtype=torch.float64))

    def step(hidden, target):
        return head(model(hidden), target)

    found = torch.compile(step, backend="eager")(rows(M), TARGET)
    torch.testing.assert_close(found, step(rows(M), TARGET), **CLOSE)


def with_another_root():
    head = layer(MIXED)
    head.root = torch.nn.Linear(d, head.root.out_features + 1, dtype=torch.float64)
    return head


class Focal(losses.OnLogits):
    """A loss of every class that is no −log f."""

    normalised = True

    def log_numerator(self, o):
        return o

    def per_class(self, o, pi):
        log_p = torch.log_softmax(o, -1)
        return -((1 - log_p.exp()) ** 2) * log_p


def assigned(head, **values):
    for name, value in values.items():
        setattr(head, name, value)
    return head


ERRORS = {
    "root: one row too many, in a loss": (
        lambda: with_another_root()(rows(M), TARGET),
        ValueError,
        r"root\.weight must have \d+ rows, one for each class of the shortlist and each cluster",
    ),
    "root: one row too many, in a prediction": (
        lambda: with_another_root().log_prob(rows(M)),
        ValueError,
        r"root\.weight must have \d+ rows",
    ),
    "assignment: a list": (lambda: ClusteredLoss(d, 3, [0, 1, 1]), TypeError, "assignment must be"),
    "assignment: a Clusters": (
        lambda: ClusteredLoss(d, 3, Clusters(torch.zeros(3).long(), torch.ones(3))),
        TypeError,
        "assignment must be a tensor of cluster indices.*pass its attribute assignment",
    ),
    "leaf: an unknown name": (
        lambda: ClusteredLoss(d, D, MIXED, leaf="foo"),
        ValueError,
        r"^leaf must be one of [^Z]*, got 'foo'$",
    ),
    "assignment: floats": (
        lambda: ClusteredLoss(d, 3, torch.zeros(3)),
        TypeError,
        r"assignment must be a tensor of cluster indices.*torch\.float32",
    ),
    "assignment: too short": (
        lambda: ClusteredLoss(d, D, MIXED[:-1]),
        ValueError,
        rf"assignment must have shape \({D},\).*got \({D - 1},\)",
    ),
    "assignment: −2": (
        lambda: ClusteredLoss(d, D, MIXED - 1),
        ValueError,
        "assignment must hold clusters 0, 1, ….*got -2",
    ),
    "assignment: a large number": (
        lambda: ClusteredLoss(d, D, MIXED + 2 * D),
        ValueError,
        f"assignment must number the clusters from 0, below the number of classes {D}",
    ),
    "counts: negative": (
        lambda: ClusteredLoss(d, D, MIXED, counts=torch.arange(D) - 1),
        ValueError,
        "counts must be zero or positive.*got -1 for class 0",
    ),
    "counts: too few": (
        lambda: ClusteredLoss(d, D, MIXED, counts=COUNTS[1:]),
        ValueError,
        rf"counts must have shape \({D},\)",
    ),
    "leaf: no distribution": (
        lambda: ClusteredLoss(d, D, MIXED, leaf="z_loss"),
        TypeError,
        "leaf must be a loss that is a distribution, got ZLoss.*taylor_softmax",
    ),
    "leaf: neither a name nor a loss": (
        lambda: ClusteredLoss(d, D, MIXED, leaf=losses.Softmax),
        TypeError,
        r"leaf must be a name or a softsphere.losses.Loss, got .*; use Softmax\(\)",
    ),
    "leaf: another loss of every class": (
        lambda: ClusteredLoss(d, D, MIXED, leaf=Focal()),
        TypeError,
        "leaf must be one of .*softmax.*got a Focal, whose per_class",
    ),
    "loss: of another kind than the engine": (
        lambda: assigned(layer(MIXED, engine="gram"), loss="softmax")(rows(M), TARGET),
        TypeError,
        "engine='gram' needs a spherical leaf",
    ),
    "loss: of another kind than the engine, in a prediction": (
        lambda: assigned(layer(MIXED, engine="factored"), loss="softmax").rank(rows(M), TARGET),
        TypeError,
        "engine='factored' needs a spherical leaf",
    ),
    "loss: no distribution": (
        lambda: assigned(layer(MIXED), loss="z_loss")(rows(M), TARGET),
        TypeError,
        "leaf must be a loss that is a distribution, got ZLoss",
    ),
    "engine: unknown, later": (
        lambda: assigned(layer(MIXED), engine="dense")(rows(M), TARGET),
        ValueError,
        "engine must be one of auto, logits, gram, factored",
    ),
    "engine: gram of softmax": (
        lambda: ClusteredLoss(d, D, MIXED, leaf="softmax", engine="gram"),
        TypeError,
        "engine='gram' needs a spherical leaf.*engine='logits'",
    ),
    "engine: factored softmax": (
        lambda: ClusteredLoss(d, D, MIXED, leaf="softmax", engine="factored"),
        TypeError,
        "engine='factored' needs a spherical leaf.*engine='logits'",
    ),
    "engine: factored and sparse": (
        lambda: ClusteredLoss(d, D, MIXED, engine="factored", sparse=True),
        ValueError,
        "sparse must be False for engine='factored'",
    ),
    "engine: factored in half precision": (
        lambda: ClusteredLoss(d, D, MIXED, engine="factored", dtype=torch.bfloat16),
        TypeError,
        "dtype must be torch.float32 or torch.float64, got torch.bfloat16",
    ),
    "weight: factored, of another engine": (
        lambda: torch.func.functional_call(
            layer(MIXED), {"weight": layer(MIXED, engine="factored").weight}, (rows(M), TARGET)
        ),
        TypeError,
        "engine='auto' needs an ordinary weight, got a FactoredTensor",
    ),
    "weight: ordinary, of factored leaves": (
        lambda: torch.func.functional_call(
            layer(MIXED, engine="factored"), {"weight": layer(MIXED).weight}, (rows(M), TARGET)
        ),
        TypeError,
        "the weight must be the factored one of a ClusteredLoss",
    ),
    "target: mapped by vmap": (
        lambda: torch.vmap(layer(MIXED))(rows(M).unsqueeze(1), TARGET.unsqueeze(1)),
        RuntimeError,
        r"vmap cannot map over the target.*reduction=\"none\".*jacrev",
    ),
    "engine: gram and sparse": (
        lambda: ClusteredLoss(d, D, MIXED, engine="gram", sparse=True),
        ValueError,
        "sparse must be False for engine='gram'",
    ),
    "engine: unknown": (
        lambda: ClusteredLoss(d, D, MIXED, engine="dense"),
        ValueError,
        "engine must be one of auto, logits, gram, factored",
    ),
    "label_smoothing": (
        lambda: ClusteredLoss(d, D, MIXED, label_smoothing=0.1),
        ValueError,
        r"label_smoothing cannot be used with a ClusteredLoss.*got 0\.1; leave it 0",
    ),
    "target: K-sparse": (
        lambda: layer(MIXED)(rows(M), TARGET.unsqueeze(1), torch.ones(M, 1)),
        TypeError,
        "target_values cannot be used.*LinearSphericalLoss",
    ),
    "target: probabilities": (
        lambda: layer(MIXED)(rows(2), torch.ones(2, D) / D),
        TypeError,
        r"target must hold class indices \(torch.int64\), got torch.float32; use Linear.*for class",
    ),
    "target: indices in floating point": (
        lambda: layer(MIXED)(rows(2), torch.ones(2)),
        TypeError,
        r"target must hold class indices \(torch.int64\), got torch.float32; use target\.long",
    ),
    "target: out of range": (
        lambda: layer(MIXED)(rows(2), torch.tensor([0, D])),
        ValueError,
        rf"target must be in \[0, {D}\).*got {D}",
    ),
    "mask": (
        lambda: layer(MIXED)(rows(M), TARGET, mask=torch.ones(D).bool()),
        TypeError,
        "mask cannot be used with a ClusteredLoss",
    ),
    "hidden: width": (
        lambda: layer(MIXED)(rows(M)[:, 1:], TARGET),
        ValueError,
        r"hidden must have shape \(…, in_features = 5\)",
    ),
    "hidden: dtype": (
        lambda: layer(MIXED)(rows(M, dtype=torch.float32), TARGET),
        TypeError,
        "weight must have the dtype of hidden",
    ),
}


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_refused_by_name(name):
    call, error, words = ERRORS[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", ["root", "project"])
def test_a_layer_above_of_another_dtype_is_refused_by_name(name):
    head = layer(MIXED, leaf_features=3)
    getattr(head, name).to(torch.float32)
    with pytest.raises(TypeError, match=rf"{name}\.weight must have the dtype of hidden"):
        head(rows(M), TARGET)


@pytest.mark.parametrize("name", ["weight", "root.weight"])
@pytest.mark.parametrize("by", ["a parametrization", "pruning"])
def test_rows_are_not_written_into_a_computed_weight(name, by):
    head = layer(MIXED)
    module = head.root if name == "root.weight" else head
    if by == "pruning":
        torch.nn.utils.prune.identity(module, "weight")
    else:
        torch.nn.utils.parametrizations.weight_norm(module)
    before = copy.deepcopy(head.state_dict())
    calls = [lambda: head.copy_rows(torch.randn(D, d))]
    if name == "weight":
        calls.append(head.reset_parameters)
    for call in calls:
        with pytest.raises(TypeError, match=f"^{name} is computed from other parameters"):
            call()
        torch.testing.assert_close(dict(head.state_dict()), dict(before), rtol=0, atol=0)


def test_nan_in_a_cluster_stays_there_with_and_without_gradients():
    head = ClusteredLoss(d, D, torch.arange(D) % 3)
    with torch.no_grad():
        head.weight[0] = torch.nan
        expected = head.log_prob(rows(M).float()).isnan()
    assert expected.any() and not expected.all()
    assert torch.equal(head.log_prob(rows(M).float()).isnan(), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda head, h, t: head(h, t),
        lambda head, h, t: head.log_prob(h),
        lambda head, h, t: head.topk(h, 2),
        lambda head, h, t: head.rank(h, t),
        lambda head, h, t: head.rows(t),
        lambda head, h, t: head.copy_rows(torch.zeros(D, d)),
    ],
    ids=["forward", "log_prob", "topk", "rank", "rows", "copy_rows"],
)
def test_a_layer_without_values_says_how_to_give_it_some(use):
    head = layer(MIXED).to("meta")
    with pytest.raises(RuntimeError, match="no values on the meta device; call to_empty"):
        use(head, rows(M).to("meta"), TARGET.to("meta"))
