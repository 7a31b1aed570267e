"""Models and output layers that do not fit are refused before anything has changed."""

from __future__ import annotations

import pytest
import torch
from _causal_models import ARCHITECTURES, V, gpt2, made
from torch import nn

from softsphere import ClusteredLoss, LinearSphericalLoss, SphericalLoss
from softsphere.integrations.transformers import replace_lm_head

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

pytestmark = [
    pytest.mark.once("the models are made by transformers, and the heads have their own tests"),
    pytest.mark.filterwarnings("ignore"),
]

ASSIGNMENT = torch.arange(V) % 6 - 1
F64 = {"dtype": torch.float64}


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
    "a hook on the lm_head": (hooked, None, "must have no hooks"),
    "replaced already": (lambda: replace_lm_head(gpt2()), None, "already"),
    "no distribution": (gpt2, lambda model: "z_loss", "is a distribution"),
    "no output layer": (gpt2, lambda model: SphericalLoss("taylor_softmax"), "head|loss must be"),
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
    with pytest.raises((TypeError, ValueError), match=words):
        replace_lm_head(model, "taylor_softmax" if head is None else head(model))
    assert type(model) is kind and dict(model.named_modules()) == modules
    assert all(module.training == model.training for module in modules.values())
    assert "_loss_function" not in vars(model) or name == "replaced already"
