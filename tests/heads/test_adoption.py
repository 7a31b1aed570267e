"""Which layers an output layer can be made from, and the warning when the two come apart."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from softsphere import LinearSphericalLoss, SphericalLoss

d, D = 6, 31


class Renamed(nn.Linear):
    """A subclass that computes nothing else."""


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + 1


class ScaledEmbedding(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


class WeightByProperty(nn.Linear):
    @property
    def weight(self):
        return nn.Parameter(2 * self._parameters["weight"])

    @weight.setter
    def weight(self, value):
        self._parameters["weight"] = value

    def register_parameter(self, name, value):
        self._parameters[name] = value


class WeightByGetattr(nn.Linear):
    def __getattr__(self, name):
        value = super().__getattr__(name)
        return nn.Parameter(2 * value) if name == "weight" else value


class CalledInside(nn.Linear):
    def _call_impl(self, *args):
        return 2 * super()._call_impl(*args)


class LowRank(nn.Module):
    """An adapter as peft has it: a wrapper that shows the weight of the layer inside."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(d, 2, bias=False), nn.Linear(2, D, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class LowRankLinear(nn.Linear):
    """An adapter as loralib has it: a subclass of nn.Linear."""

    def __init__(self):
        super().__init__(d, D)
        self.down, self.up = nn.Parameter(torch.randn(2, d)), nn.Parameter(torch.randn(D, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Transposed(nn.Module):
    """Conv1D of transformers, whose weight is (in_features, out_features)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, D)), nn.Parameter(torch.randn(D))

    def forward(self, x):
        return x @ self.weight + self.bias


class Double(nn.Module):
    def forward(self, W):
        return 2 * W


def changed(change, make=lambda: nn.Linear(d, D)):
    """A layer after something was done to it."""

    def made():
        layer = make()
        return change(layer) or layer

    return made


def forward_replaced(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


def call_replaced(layer):
    plain = layer._call_impl
    layer._call_impl = lambda x: 2 * plain(x)


def doubled(module, args, output):
    return 2 * output


def with_parameter(name, value):
    def change(layer):
        layer._parameters[name] = nn.Parameter(value, requires_grad=value.is_floating_point())

    return change


def quantised(layer):
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this build has no quantised operators")
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(layer)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)[0]


def training_for_quantisation(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        return torch.ao.nn.qat.Linear(d, D, qconfig=config)


# Layers that compute something else than W h + b or have no weight, and a part of the error.
REFUSED = {
    "no layer": (lambda: torch.zeros(D, d), "nn.Linear or an nn.Embedding.*got Tensor"),
    "no weight": (nn.ReLU, "nn.Linear or an nn.Embedding.*got ReLU"),
    "a norm": (lambda: nn.LayerNorm((D, d)), "got LayerNorm"),
    "bilinear": (lambda: nn.Bilinear(d, d, D), "got Bilinear"),
    "convolution": (lambda: nn.Conv1d(d, D, 1), "got Conv1d"),
    "transposed": (Transposed, "got Transposed"),
    "bag": (lambda: nn.EmbeddingBag(D, d), "got EmbeddingBag"),
    "adapter around": (lambda: LowRank(nn.Linear(d, D)), "got LowRank; if it wraps.*merge"),
    "adapter inside": (LowRankLinear, "LowRankLinear has a forward of its own.*merge"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(d, D)), "got DataParallel; if it wraps"),
    "own forward": (lambda: Scaled(d, D), "Scaled has a forward of its own"),
    "own call": (lambda: Called(d, D), "Called has a forward of its own"),
    "call replaced": (changed(call_replaced), "Linear has a forward of its own"),
    "call inside": (lambda: CalledInside(d, D), "CalledInside has a forward of its own"),
    "weight by property": (lambda: WeightByProperty(d, D), "WeightByProperty computes it"),
    "weight by getattr": (lambda: WeightByGetattr(d, D), "WeightByGetattr computes it"),
    "sparse": (
        changed(with_parameter("weight", torch.zeros(D, d).to_sparse())),
        "must be a dense tensor, got layout torch.sparse_coo",
    ),
    "forward replaced": (changed(forward_replaced), "Linear has a forward of its own"),
    "embedding's own forward": (
        lambda: ScaledEmbedding(D, d),
        "what Embedding computes.*ScaledEmbedding has.*nn.Linear without a bias",
    ),
    "max_norm": (lambda: nn.Embedding(D, d, max_norm=1.0), "make it without max_norm"),
    "forward hook": (
        changed(lambda x: (x.register_forward_hook(doubled), None)[1]),
        "the forward hook doubled",
    ),
    "forward pre-hook": (
        changed(lambda x: (x.register_forward_pre_hook(lambda m, a: None), None)[1]),
        "the forward pre hook",
    ),
    "backward hook": (
        changed(lambda x: (x.register_full_backward_hook(lambda m, i, o: None), None)[1]),
        "the backward hook",
    ),
    "backward pre-hook": (
        changed(lambda x: (x.register_full_backward_pre_hook(lambda m, o: None), None)[1]),
        "the backward pre hook",
    ),
    "spectral norm": (
        changed(parametrizations.spectral_norm),
        "its weight is computed by a parametrization.*on that output layer",
    ),
    "weight norm": (changed(parametrizations.weight_norm), "computed by a parametrization"),
    "bias computed": (
        changed(lambda x: parametrize.register_parametrization(x, "bias", Double())),
        "its bias is computed",
    ),
    "old spectral norm": (changed(nn.utils.spectral_norm), "the forward pre hook SpectralNorm"),
    "pruned": (
        changed(lambda x: prune.l1_unstructured(x, "weight", 0.5)),
        "the forward pre hook L1Unstructured",
    ),
    "quantised": (changed(quantised), "got Linear; if it wraps"),
    "to be quantised": (changed(training_for_quantisation), "has a forward of its own"),
    "lazy": (lambda: nn.LazyLinear(D), "has not seen its first batch"),
    "8 bits": (changed(with_parameter("weight", torch.zeros(D, d).char())), "got torch.int8"),
    "float8": (
        changed(with_parameter("weight", torch.zeros(D, d).to(torch.float8_e4m3fn))),
        "got torch.float8_e4m3fn",
    ),
    "complex": (lambda: nn.Linear(d, D, dtype=torch.complex64), "got torch.complex64"),
    "flat weight": (changed(with_parameter("weight", torch.zeros(D * d))), r"shape \(186,\)"),
    "no class": (changed(with_parameter("weight", torch.zeros(0, d))), "at least one class"),
    "old bias": (
        changed(with_parameter("bias", torch.zeros(D - 1))),
        r"`bias` of shape \(31,\).*got Parameter of shape \(30,\)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_computes_something_else_is_refused(case):
    make, words = REFUSED[case]
    layer = make()
    with pytest.raises((TypeError, ValueError), match=words):
        LinearSphericalLoss.from_linear(layer)


def test_a_refusal_computes_no_parametrization():
    """The spectral norm takes a step of its power iteration whenever its weight is read."""
    layer = parametrizations.spectral_norm(nn.Linear(d, D))
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    with pytest.raises(TypeError):
        LinearSphericalLoss.from_linear(layer)
    assert all(torch.equal(layer.state_dict()[name], x) for name, x in before.items())


# Layers that compute W h + b.
ACCEPTED = {
    "linear": lambda: nn.Linear(d, D),
    "no bias": lambda: nn.Linear(d, D, bias=False),
    "renamed": lambda: Renamed(d, D),
    "of attention": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(d, D),
    "compiled in place": changed(lambda x: x.compile(backend="eager")),
    "was lazy": changed(lambda x: (x(torch.zeros(1, d)), None)[1], lambda: nn.LazyLinear(D)),
    "was parametrized": changed(
        lambda x: parametrize.remove_parametrizations(parametrizations.weight_norm(x), "weight")
    ),
    "hook removed": changed(lambda x: x.register_forward_hook(doubled).remove()),
    "float64": lambda: nn.Linear(d, D, dtype=torch.float64),
    "bfloat16": lambda: nn.Linear(d, D, dtype=torch.bfloat16),
    "embedding": lambda: nn.Embedding(D, d),
    "embedding with padding": lambda: nn.Embedding(D, d, padding_idx=3),
    "embedding with frequencies": lambda: nn.Embedding(D, d, scale_grad_by_freq=True, sparse=True),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_layer_that_computes_a_product_is_shared(case):
    torch.manual_seed(0)
    layer = ACCEPTED[case]()
    head = LinearSphericalLoss.from_linear(layer, prior=torch.arange(1, D + 1))
    assert head.weight is layer.weight and head.bias is getattr(layer, "bias", None)
    assert head.prior.dtype == (torch.float64 if case == "float64" else torch.float32)
    hidden, target = torch.randn(4, d, dtype=layer.weight.dtype), torch.arange(4)
    logits = layer(hidden) if isinstance(layer, nn.Linear) else hidden @ layer.weight.T
    criterion = SphericalLoss("taylor_softmax", prior=head.prior)
    close = {"rtol": 0.02, "atol": 0.02} if layer.weight.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(head(hidden, target), criterion(logits, target), **close)
    if layer.weight.dtype != torch.bfloat16:
        torch.testing.assert_close(head.log_prob(hidden), criterion.log_prob(logits))


def test_a_padding_row_is_a_class_like_any_other():
    """As in F.linear(hidden, embedding.weight): the embedding gives its row no gradient, the
    output layer does."""
    words = nn.Embedding(D, d, padding_idx=3, dtype=torch.float64)
    head = LinearSphericalLoss.from_linear(words)
    tokens, target = torch.tensor([3, 5]), torch.tensor([3, 1])
    head(words(tokens), target).backward()
    W = words.weight.detach().clone().requires_grad_()
    logits = F.linear(F.embedding(tokens, W, padding_idx=3), W)
    SphericalLoss("taylor_softmax")(logits, target).backward()
    torch.testing.assert_close(words.weight.grad, W.grad)
    assert words.weight.grad[3].any()


def test_a_parametrization_goes_on_the_output_layer():
    """What the refusal of a parametrized layer advises."""
    torch.manual_seed(0)
    head = LinearSphericalLoss.from_linear(nn.Linear(d, D)).eval()
    parametrizations.spectral_norm(head, "weight")
    layer = nn.Linear(d, D)
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)
    hidden, target = torch.randn(4, d), torch.arange(4)
    torch.testing.assert_close(
        head(hidden, target), SphericalLoss("taylor_softmax")(layer(hidden), target)
    )


class Model(nn.Module):
    """A language model whose output layer shares the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(D, d)
        self.head = LinearSphericalLoss.from_linear(self.words)

    def forward(self, tokens, target):
        return self.head(self.words(tokens), target)


TOKENS = torch.tensor([1, 2]), torch.tensor([3, 4])


def assigned(model):
    model.load_state_dict(model.state_dict(), assign=True)


def emptied(model):
    device = model.head.weight.device
    model.to("meta").to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)


def replaced(model):
    model.words.weight = nn.Parameter(torch.randn(D + 2, d))


def head_replaced(model):
    model.head.weight = nn.Parameter(torch.randn(D, d))


def parametrized_later(model):
    parametrizations.spectral_norm(model.words)


@pytest.mark.parametrize("ask", ["loss", "log_prob", "predict", "topk", "rank"])
@pytest.mark.parametrize("lose", [assigned, emptied, replaced, head_replaced, parametrized_later])
def test_a_tie_that_is_lost_is_told(lose, ask):
    model = Model()
    lose(model)
    hidden, target = torch.randn(2, d), TOKENS[1]
    asked = {
        "loss": lambda: model.head(hidden, target),
        "log_prob": lambda: model.head.log_prob(hidden),
        "predict": lambda: model.head.predict(hidden),
        "topk": lambda: model.head.topk(hidden, 2),
        "rank": lambda: model.head.rank(hidden, target),
    }
    with pytest.warns(UserWarning, match=r"no longer that of the \w*Embedding.*from_linear"):
        asked[ask]()


def test_a_tie_that_is_made_again_is_quiet():
    model = Model()
    assigned(model)
    model.head.weight = model.words.weight
    model(*TOKENS).backward()


def moved(model):
    return model.double().float()


def loaded(model):
    model.load_state_dict({k: x.clone() for k, x in model.state_dict().items()})
    return model


def trained(model):
    model(*TOKENS).backward()
    torch.optim.Adam(model.parameters()).step()
    return model


def called_with_others(model):
    state = {name: torch.randn_like(x) for name, x in model.named_parameters()}
    torch.func.functional_call(model, state, TOKENS)
    torch.func.functional_call(
        model.head, {"weight": torch.randn(D, d)}, (torch.randn(2, d), *TOKENS[:1])
    )
    return model


KEPT = {
    "moved": moved,
    "loaded": loaded,
    "trained": trained,
    "called with others": called_with_others,
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("how", KEPT)
def test_a_tie_is_kept(how):
    model = KEPT[how](Model())
    assert model.head.weight is model.words.weight
    model(*TOKENS).backward()
    model.head.predict(torch.randn(2, d))


def test_a_deep_copy_tells_of_its_own_tie():
    model = Model()
    other = copy.deepcopy(model)
    replaced(model)
    other(*TOKENS)
    replaced(other)
    with pytest.warns(UserWarning, match="no longer"):
        other.head.predict(torch.randn(2, d))


def test_a_copy_of_the_output_layer_alone_is_tied_to_nothing():
    model = Model()
    head = copy.deepcopy(model.head)
    head(torch.randn(2, d), TOKENS[1])


def test_the_layer_is_not_kept_alive():
    linear = nn.Linear(d, D)
    head = LinearSphericalLoss.from_linear(linear)
    del linear
    gc.collect()
    assert head._tie._layer() is None
    head.weight = nn.Parameter(torch.randn(D, d))
    head(torch.randn(2, d), TOKENS[1])


def test_a_layer_object_that_is_gone_is_not_told():
    """Nothing tells a layer that was replaced as a whole from one that was meant to be dropped."""
    model = Model()
    model.words = nn.Embedding(D, d)
    gc.collect()
    model(*TOKENS)


def test_the_bias_is_looked_at_as_well():
    linear = nn.Linear(d, D)
    head = LinearSphericalLoss.from_linear(linear)
    linear.bias = None
    with pytest.warns(UserWarning, match="the bias of this LinearSphericalLoss is no longer"):
        head(torch.randn(2, d), TOKENS[1])


def test_the_weight_of_any_embedding_can_be_shared_as_it_is():
    """What the refusal of an embedding with a forward of its own advises."""
    words, linear = ScaledEmbedding(D, d), nn.Linear(d, D, bias=False)
    linear.weight = words.weight
    head = LinearSphericalLoss.from_linear(linear)
    assert head.weight is words.weight
    head(torch.randn(2, d), TOKENS[1]).backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["pruned", "a replica"])
def test_a_computed_weight_and_a_replica_are_tied_still(how):
    linear = nn.Linear(4, 7)
    head = LinearSphericalLoss.from_linear(linear)
    if how == "pruned":
        prune.l1_unstructured(head, "weight", 0.3)
        assert head.weight_orig is linear.weight
    else:  # as nn.DataParallel makes one
        whole = head
        head = whole._replicate_for_data_parallel()
        for name, x in whole.named_parameters():
            setattr(head, name, x.clone())
    head(torch.randn(3, 4), torch.arange(3))
    head.predict(torch.randn(3, 4))
