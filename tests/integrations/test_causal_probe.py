"""Models and output layers that do not fit are refused before anything has changed."""

from __future__ import annotations

import sys

import pytest
from _causal_models import ARCHITECTURES, ASSIGNMENT, F64, V, gpt2, made
from torch import nn

from softsphere import ClusteredLoss, LinearSphericalLoss, SphericalLoss, losses
from softsphere.integrations.transformers import replace_lm_head

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

pytestmark = [
    pytest.mark.once("the models are made by transformers, and the heads have their own tests"),
    pytest.mark.filterwarnings("ignore"),
]


def llama(**options):
    return made("Llama", **{**ARCHITECTURES["Llama"][0]().config.to_dict(), **options})


def hooked():
    model = gpt2()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


def gemma2():
    config = ARCHITECTURES["Gemma 2"][0]().config.to_dict()
    return made("Gemma2", **{**config, "final_logit_softcapping": 30.0})


def linear(**options):
    return lambda model: LinearSphericalLoss(16, V, **{**F64, **options})


def sharded(model):
    head = LinearSphericalLoss(16, V, **F64)
    head.shards = "the shards of a process group"
    return head


def without_values():
    model = gpt2()
    model.lm_head.to("meta")
    return model


def computed():
    """A model with another loss."""
    model = gpt2()
    model.loss_function = nn.functional.cross_entropy
    return model


class ByItself(transformers.GPT2LMHeadModel):
    """A model whose forward computes its loss by itself."""

    def forward(self, input_ids=None, labels=None):
        logits = self.lm_head(self.transformer(input_ids).last_hidden_state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Mine(LinearSphericalLoss):
    """An output layer of a user."""


REFUSALS = {
    "softcapping": (gemma2, None, "final_logit_softcapping"),
    "scaled logits": (
        lambda: made("Granite", **{**llama().config.to_dict(), "logits_scaling": 2.0}),
        None,
        "logits_scaling",
    ),
    "an encoder and a decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        None,
        "causal language model with an lm_head",
    ),
    "no lm_head": (lambda: gpt2().transformer, None, "causal language model with an lm_head"),
    "masked tokens": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            )
        ),
        None,
        "causal language model with an lm_head",
    ),
    "no model of transformers": (lambda: nn.Linear(2, 2), None, "PreTrainedModel, got Linear"),
    "a hook on the lm_head": (hooked, None, "lm_head cannot be replaced: .* must have no hooks"),
    "no values": (without_values, None, "lm_head is on the meta device"),
    "another loss": (computed, None, "that of this GPT2LMHeadModel is cross_entropy"),
    "a loss of its own": (
        lambda: ByItself(gpt2().config).double(),
        None,
        "ByItself called the one 1 times and the other 0 times",
    ),
    "replaced already": (lambda: replace_lm_head(gpt2()), None, "already"),
    "no distribution": (gpt2, lambda model: "z_loss", "is a distribution"),
    "no output layer": (
        gpt2,
        lambda model: SphericalLoss("taylor_softmax"),
        "head must be the name of a loss, .* got SphericalLoss",
    ),
    "a plain layer": (gpt2, lambda model: nn.Linear(16, V), "head must be .* got Linear"),
    "a class": (gpt2, lambda model: LinearSphericalLoss, "head .* the class LinearSphericalLoss"),
    "the class of a loss": (gpt2, lambda model: losses.ZLoss, "head .* got the class ZLoss"),
    "an unknown name": (gpt2, lambda model: "taylor", "head must be one of .* got 'taylor'"),
    "a subclass": (gpt2, lambda model: Mine(16, V, **F64), "head must be .* got Mine"),
    "the head of another model": (
        gpt2,
        lambda model: replace_lm_head(gpt2()).lm_head,
        "LinearSphericalLoss is the lm_head of one already",
    ),
    "a process group": (gpt2, sharded, "head must have no process_group"),
    "a sum": (gpt2, linear(reduction="sum"), "reduction='mean'"),
    "another ignore_index": (gpt2, linear(ignore_index=0), "ignore_index=-100"),
    "another size": (gpt2, lambda model: LinearSphericalLoss(16, V + 1), f"num_classes={V}"),
    "another device": (gpt2, linear(device="meta"), "on the device of the lm_head"),
    "untied from a tied model": (lambda: gpt2(tied=True), linear(), "tie_word_embeddings = False"),
    "clusters in a tied model": (
        lambda: gpt2(tied=True),
        lambda model: ClusteredLoss(16, V, ASSIGNMENT),
        "tie_word_embeddings = False",
    ),
    "tied in an untied model": (
        gpt2,
        lambda model: LinearSphericalLoss.from_linear(model.transformer.wte),
        "tie_word_embeddings is False",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_anything_has_changed(name):
    make, head, words = REFUSALS[name]
    model = make()
    kind, modules = type(model), dict(model.named_modules())
    loss = vars(model).get("_loss_function")
    with pytest.raises((TypeError, ValueError), match=words):
        replace_lm_head(model, "taylor_softmax" if head is None else head(model))
    assert type(model) is kind and dict(model.named_modules()) == modules
    assert all(module.training == model.training for module in modules.values())
    assert vars(model).get("_loss_function") is loss


def test_the_loss_of_a_language_model_may_have_been_set():
    model = gpt2()
    model.loss_function = loss = model.loss_function
    with pytest.raises(TypeError, match="got Linear"):
        replace_lm_head(model, nn.Linear(16, V))
    assert model.loss_function is loss
    replace_lm_head(model)
    assert model.loss_function is not loss


def test_the_extra_is_named_where_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers accelerate"):
        replace_lm_head(nn.Linear(2, 2))
