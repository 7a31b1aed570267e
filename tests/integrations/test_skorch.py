"""A classifier of scikit-learn has the probabilities of its loss."""

from __future__ import annotations

import importlib.util
import pickle

import pytest
import torch
from torch import nn

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SphericalLoss,
    TaylorSoftmaxLoss,
)

skorch = pytest.importorskip("skorch")
np = pytest.importorskip("numpy")
sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402
from skorch.callbacks import Checkpoint, EarlyStopping  # noqa: E402

from softsphere.integrations.skorch import SphericalClassifier  # noqa: E402

pytestmark = [
    pytest.mark.once("scikit-learn hands over arrays"),
    pytest.mark.filterwarnings("ignore"),
]

d, D = 5, 4
X = torch.randn(40, d, generator=torch.Generator().manual_seed(0)).double().numpy()
y = (X @ np.arange(1, d * D + 1).reshape(d, D) % 7).argmax(1)
LINEAR = {"module": nn.Linear, "module__in_features": d, "module__bias": True}
SIZES = {"criterion__in_features": d, "criterion__num_classes": D}
# The criterion with its options, and the size of what the module returns.
CRITERIA = {
    "taylor": ({"criterion": TaylorSoftmaxLoss}, D),
    "by name": ({"criterion": SphericalLoss, "criterion__loss": "spherical_softmax"}, D),
    "linear": ({"criterion": LinearSphericalLoss, **SIZES}, d),
    "factored": ({"criterion": FactoredSphericalLoss, **SIZES}, d),
    "clustered": (
        {"criterion": ClusteredLoss, **SIZES, "criterion__assignment": torch.arange(D) % 3 - 1},
        d,
    ),
}


def made(name, **options):
    torch.manual_seed(0)
    criterion, out = CRITERIA[name]
    if "criterion__in_features" in criterion:
        criterion = {**criterion, "criterion__dtype": torch.float64}
    options = {"max_epochs": 3, "lr": 0.05, "verbose": 0, "train_split": None, **options}
    net = SphericalClassifier(**LINEAR, **criterion, module__out_features=out, **options)
    net.set_params(module__dtype=torch.float64)
    return net


@pytest.mark.parametrize("name", CRITERIA)
def test_probabilities_and_steps_are_those_of_a_loop_by_hand(name):
    net = made(name, batch_size=-1).initialize()
    module, criterion = pickle.loads(pickle.dumps((net.module_, net.criterion_)))
    net.partial_fit(X, y)
    inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
    sgd = torch.optim.SGD([*module.parameters(), *criterion.parameters()], 0.05)
    for _ in range(3):
        sgd.zero_grad()
        criterion(module(inputs), targets).backward()
        sgd.step()
    probabilities = net.predict_proba(X)
    want = criterion.log_prob(module(inputs)).exp().detach().numpy()
    np.testing.assert_allclose(probabilities, want, rtol=1e-9)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    assert (net.predict(X) == want.argmax(1)).all()
    again = pickle.loads(pickle.dumps(net))
    np.testing.assert_allclose(again.predict_proba(X), probabilities, rtol=1e-12)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_compiled_net_has_the_same_probabilities(name):
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        options = {"compile": compiles, "compile__backend": "eager"} if compiles else {}
        found.append(made(name, **options).fit(X, y).predict_proba(X))
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_a_search_and_clones():
    net = clone(made("taylor"))
    search = GridSearchCV(net, {"lr": [0.01, 0.1]}, cv=2, scoring="neg_log_loss").fit(X, y)
    assert np.isfinite(search.best_score_)


def test_other_criteria_and_a_given_nonlinearity_are_left_to_skorch():
    net = made("taylor", predict_nonlinearity=None).fit(X, y)
    assert (net.predict_proba(X) == net.forward(torch.as_tensor(X)).numpy()).all()
    net = made("taylor").set_params(criterion=nn.CrossEntropyLoss).fit(X, y)
    np.testing.assert_allclose(
        net.predict_proba(X), net.forward(torch.as_tensor(X)).softmax(1).numpy()
    )


def test_a_loss_without_probabilities_is_refused():
    net = made("by name").set_params(criterion__loss="z_loss").fit(X, y)
    with pytest.raises(TypeError, match="not a normalised distribution"):
        net.predict_proba(X)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("safe", [False, True], ids=["torch", "safetensors"])
def test_the_file_of_the_module_has_the_output_layer(name, safe, tmp_path):
    if safe and importlib.util.find_spec("safetensors") is None:
        pytest.skip("needs safetensors")
    net = made(name).fit(X, y)
    net.save_params(f_params=tmp_path / "net", use_safetensors=safe)
    other = made(name, max_epochs=1).fit(X[::-1].copy(), y)
    other.load_params(f_params=tmp_path / "net", use_safetensors=safe)
    assert (other.predict_proba(X) == net.predict_proba(X)).all()


def test_a_checkpoint_without_a_file_for_the_criterion_has_the_output_layer(tmp_path):
    keeps = Checkpoint(monitor=None, dirname=tmp_path, f_criterion=None)
    net = made("linear", callbacks=[keeps]).fit(X, y)
    other = made("linear").initialize()
    other.load_params(checkpoint=keeps)
    assert (other.predict_proba(X) == net.predict_proba(X)).all()


def test_a_callback_that_restores_the_module_alone_is_refused():
    stopping = EarlyStopping(load_best=True)
    with pytest.raises(ValueError, match=r"'stop' is EarlyStopping\(load_best=True\)"):
        made("linear", callbacks=[("stop", stopping)]).fit(X, y)
    # without parameters in the criterion the callback restores all there is
    made("taylor", callbacks=[EarlyStopping("train_loss", load_best=True)]).fit(X, y)
    made("linear", callbacks=[EarlyStopping("train_loss")]).fit(X, y)


LABELS = {
    "strings": (y.astype(str), "LabelEncoder"),
    "objects": (y.astype(str).astype(object), "LabelEncoder"),
    "list of strings": (y.astype(str).tolist(), "LabelEncoder"),
    "truth values": (y == 1, "LabelEncoder"),
    "floats": (y + 0.0, "LabelEncoder"),
    "list": (y.tolist(), r"got a list; pass np.array\(y\)"),
    "tuple": (tuple(y), "got a tuple"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_class_numbers_are_refused(name):
    labels, cure = LABELS[name]
    net = made("taylor").initialize()
    before = net.module_.weight.clone()
    with pytest.raises(TypeError, match=f"^y must .*{cure}"):
        net.fit(X, labels)
    assert (net.module_.weight == before).all()


class Sized(nn.Module):
    """Takes inputs of any width and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(D)

    def forward(self, x):
        return self.layer(x.float())


def test_the_checks_of_scikit_learn_fail_where_those_of_skorch_fail():
    def failed(kind, criterion):
        net = kind(Sized, criterion=criterion, max_epochs=2, verbose=0, train_split=None)
        results = check_estimator(net, on_fail=None, on_skip=None)
        return {r["check_name"] for r in results if r["status"] == "failed"}, len(results)

    ours, number = failed(SphericalClassifier, TaylorSoftmaxLoss)
    theirs, _ = failed(skorch.NeuralNetClassifier, nn.CrossEntropyLoss)
    assert number > 30
    assert ours <= theirs, ours - theirs


def test_outputs_that_skorch_moved_to_the_cpu_meet_a_criterion_on_a_gpu():
    """`predict_proba` hands over outputs on the CPU wherever the criterion is."""
    net = made("linear").initialize()
    net.criterion_ = net.criterion_.to("meta")  # stands in for a GPU
    outputs = torch.randn(3, d, dtype=torch.float64)
    found = net._get_predict_nonlinearity()(outputs)
    assert found.device.type == "meta" and found.shape == (3, D)
