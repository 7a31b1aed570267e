"""What a call of a language model with an output layer of ours takes, shares and refuses."""

from __future__ import annotations

import threading

import pytest
import torch
from _causal_models import ARCHITECTURES, F64, N, V, batch, gpt2, llava, near, nll, with_head
from torch import nn

from softsphere import LinearSphericalLoss, losses
from softsphere.integrations.transformers import replace_lm_head

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

pytestmark = [
    pytest.mark.once("the models are made by transformers, and the heads have their own tests"),
    pytest.mark.filterwarnings("ignore"),
]


def configs(model):
    """Which modules have one config object, and whose part of the model's config it is."""
    own = model.config
    parts = {id(own): "", **{id(getattr(own, name)): name for name in own.sub_configs}}
    return {
        name: parts.get(id(x.config)) for name, x in model.named_modules() if hasattr(x, "config")
    }


MODELS = {"GPT-2": gpt2, "Llama": ARCHITECTURES["Llama"][0], "with parts of a config": llava}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_of_one_config_keep_it(name):
    model = MODELS[name]()
    config = model.config
    before, structure = config.to_dict(), configs(model)
    assert None not in structure.values()
    replace_lm_head(model)
    assert model.config is not config and config.to_dict() == before
    assert configs(model) == structure
    assert model.config.to_dict() == before
    model.resize_token_embeddings(V + 8)
    model.set_attn_implementation("eager")
    assert config.to_dict() == before


def test_calls_of_two_threads_do_not_mix():
    """While one call computes a sum, another thread computes a mean and scores."""
    model = with_head("linear").eval()
    given, tokens = batch(), batch(1)["input_ids"]
    first = threading.get_ident()
    want = model(**given, num_items_in_batch=3).loss, model(**given).loss, model(tokens).logits
    seen = []

    def elsewhere(*_):
        if threading.get_ident() == first:
            other = threading.Thread(
                target=lambda: seen.append((model(**given).loss, model(tokens).logits))
            )
            other.start()
            other.join()

    model.lm_head.register_forward_pre_hook(elsewhere)
    near(model(**given, num_items_in_batch=3).loss, want[0])
    assert len(seen) == 3  # once where hidden passes, for the loss, and for the logits
    for each in seen:
        near(each, want[1:])


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers needs it to be compiled"
)
def test_a_compiled_model_is_one_graph():
    model = replace_lm_head(gpt2(tied=True)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given, seen = batch(), []

    def run():
        outputs = compiled(**given, num_items_in_batch=3)
        seen.append((outputs.loss, outputs.logits))

    run()
    other = threading.Thread(target=run)
    other.start()
    other.join()
    want = model(**given, num_items_in_batch=3)
    assert len(seen) == 2
    for each in seen:
        near(each, (want.loss, want.logits))


def test_outputs_as_a_tuple_and_shifted_labels():
    model = replace_lm_head(gpt2(tied=True))
    given = batch()
    want = model(**given).loss
    near(model(**given, return_dict=False)[0], want)
    near(model(**given, return_dict=None).loss, want)
    shifted = nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    near(model(**given, shift_labels=shifted).loss, want)
    loss, logits, *_ = model.eval()(**given, return_dict=False)
    near(loss, want)
    assert logits.shape == (2, N, V)
    with pytest.raises(TypeError, match="that of its output layer"):
        model.loss_function = nn.functional.cross_entropy


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("items", [None, 7])
def test_another_ignore_index(items, shifted):
    model = replace_lm_head(gpt2(tied=True))
    given = batch()
    want = model(**given, num_items_in_batch=items).loss
    for index in (-1, 3):
        labels = given["labels"].where(given["labels"] != index, 5)
        want = model(given["input_ids"], labels=labels, num_items_in_batch=items).loss
        others = labels.where(labels != -100, index)
        options = {"labels": others, "ignore_index": index, "num_items_in_batch": items}
        if shifted:
            options["shift_labels"] = nn.functional.pad(others, (0, 1), value=index)[:, 1:]
            options["labels"] = torch.zeros_like(others)
        near(model(given["input_ids"], **options).loss, want)
    # −100 is then the label of no token
    with pytest.raises(ValueError, match=r"labels must be in .* or ignore_index = 3, got -100"):
        model(**given, ignore_index=3)


NOT_OF_A_CALL = {"label_smoothing": 0.1, "weight": torch.ones(V), "reduction": "sum"}


@pytest.mark.parametrize("name", NOT_OF_A_CALL)
def test_arguments_of_the_head_are_refused_in_a_call(name):
    model = replace_lm_head(gpt2(tied=True))
    with pytest.raises(TypeError, match=f"{name} cannot be given to a call of the model"):
        model._loss_of_hidden(
            torch.ones(1, 2, 16), torch.ones(1, 2).long(), **{name: NOT_OF_A_CALL[name]}
        )
    with pytest.raises(TypeError, match=name):
        model(**batch(), **{name: NOT_OF_A_CALL[name]})


def test_labels_of_an_unfit_shape_leave_the_model_as_it_was():
    model = replace_lm_head(gpt2(tied=True))
    with pytest.raises(ValueError, match=r"labels must have the shape \(2, 2\).*logits_to_keep"):
        model(**batch(), logits_to_keep=2)
    assert model(batch()["input_ids"]).logits.shape == (2, N, V)


def test_a_model_in_evaluation_mode_has_its_head_in_it():
    """A margin is of training alone."""
    model = replace_lm_head(gpt2().eval(), losses.SoftMarginSoftmax(margin=2.0))
    outputs = model(**batch())
    near(outputs.loss, nll(outputs.logits, batch()["labels"]))
    assert model.train()(**batch()).loss > outputs.loss + 0.1


def test_a_head_in_a_model_has_the_name_of_its_class():
    model = with_head("clustered")
    assert "ClusteredLoss(" in repr(model) and "Causal" not in repr(model)
    with pytest.raises(TypeError, match="of a ClusteredLoss cannot be resized"):
        model.resize_token_embeddings(V + 1)
    with pytest.raises(TypeError, match="but this ClusteredLoss is the lm_head of one already"):
        replace_lm_head(gpt2(), model.lm_head)


def test_the_class_of_the_model_makes_no_model_without_a_head(tmp_path):
    model = replace_lm_head(gpt2())
    with pytest.raises(TypeError, match="cannot be made from a config alone"):
        type(model)(model.config)
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="by the from_pretrained of its class"):
        type(model).from_pretrained(tmp_path)


def test_an_lm_head_that_is_replaced_again_is_told():
    model = replace_lm_head(gpt2())
    model.lm_head = nn.Linear(16, V, **F64)
    with pytest.raises(TypeError, match="but it is Linear now"):
        model(**batch())


def test_the_head_of_a_model_takes_a_mask():
    head = LinearSphericalLoss(16, V, **F64)
    hidden, target, mask = torch.ones(3, 16).double(), torch.arange(3), torch.arange(V) < 5
    want = head(hidden, target, mask=mask)
    replace_lm_head(gpt2(), head)
    near(head(hidden, target, mask=mask), want)
    near(head(hidden, target, None, mask), want)
