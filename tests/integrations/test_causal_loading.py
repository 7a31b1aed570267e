"""A language model that was saved with its output layer is the same model once it is loaded."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from _causal_models import (
    ARCHITECTURES,
    ASSIGNMENT,
    F64,
    HEADS,
    V,
    batch,
    gpt2,
    llava,
    near,
    states,
    with_head,
)
from safetensors.torch import load_file, save_file
from torch import nn

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    losses,
)
from softsphere.integrations.head_description import described, made_again
from softsphere.integrations.transformers import from_pretrained, replace_lm_head

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

pytestmark = [
    pytest.mark.once("the models are made by transformers, and the heads have their own tests"),
    pytest.mark.filterwarnings("ignore"),
]

OPTIONS = LinearSphericalOptions("gram", None, 8, torch.float64, True)


def tied_with_bias():
    model = gpt2(tied=True)
    head = LinearSphericalLoss(16, V, **F64)
    head.weight = model.lm_head.weight
    return replace_lm_head(model, head)


def half(head):
    return replace_lm_head(gpt2().bfloat16(), head)


def changed_later():
    model = replace_lm_head(gpt2())
    model.lm_head.label_smoothing = 0.2
    model.lm_head.options = LinearSphericalOptions(accumulate_dtype=torch.float64)
    return model


SAVED = {
    **{
        name: (lambda make=make: replace_lm_head(make()))
        for name, (make, _) in ARCHITECTURES.items()
    },
    **{kind: (lambda kind=kind: with_head(kind)) for kind in HEADS},
    "options": lambda: replace_lm_head(gpt2(), LinearSphericalLoss(16, V, options=OPTIONS, **F64)),
    "an lm_head with another name in files": lambda: replace_lm_head(
        ARCHITECTURES["GPT-NeoX"][0](), HEADS["linear"]()
    ),
    "a loss with a number": lambda: replace_lm_head(gpt2(), losses.SphericalSoftmax(eps=0.3)),
    "clustered, factored": lambda: replace_lm_head(
        gpt2(), ClusteredLoss(16, V, ASSIGNMENT, engine="factored", **F64)
    ),
    "tied with a bias": tied_with_bias,
    "changed later": changed_later,
    "half": lambda: half("taylor_softmax"),
    "half below float32": lambda: half(LinearSphericalLoss(16, V, prior=torch.arange(1.0, V + 1))),
    "half below float32 clusters": lambda: half(ClusteredLoss(16, V, ASSIGNMENT)),
    "half below float32 factors": lambda: half(FactoredSphericalLoss(16, V)),
}


@pytest.mark.parametrize("kind", SAVED)
def test_what_was_saved_is_loaded(kind, tmp_path):
    model = SAVED[kind]()
    model(**batch()).loss.backward()
    torch.optim.SGD(model.parameters(), 0.05).step()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    head, own = loaded.lm_head, model.lm_head
    assert type(head) is type(own) and head.loss == own.loss and repr(head) == repr(own)
    assert loaded.dtype == model.dtype and not (loaded.training or head.training)
    assert getattr(head, "options", None) == getattr(own, "options", None)
    torch.testing.assert_close(states(loaded), states(model), rtol=0, atol=0)
    tied = [x.lm_head.weight is x.get_input_embeddings().weight for x in (loaded, model)]
    assert tied[0] == tied[1]
    got, want = loaded(**batch()), model.eval()(**batch())
    near((got.loss, got.logits), (want.loss, want.logits))


@pytest.mark.parametrize("options", [{"max_shard_size": 2000}, {"variant": "test"}])
def test_files_of_other_names(options, tmp_path):
    with_head("clustered").save_pretrained(tmp_path)  # other numbers, in model.safetensors
    if "max_shard_size" in options:
        (tmp_path / "model.safetensors").unlink()
    model = with_head("linear")
    model.save_pretrained(tmp_path, **options)
    options.pop("max_shard_size", None)
    torch.testing.assert_close(states(from_pretrained(tmp_path, **options)), states(model))


def test_a_dtype_that_is_asked_for_is_that_of_the_head(tmp_path):
    for kind in ("linear", "clustered", "factored"):
        with_head(kind).save_pretrained(tmp_path / kind)
        for dtype in (torch.float32, torch.bfloat16):
            loaded = from_pretrained(tmp_path / kind, dtype=dtype)
            half = kind == "factored" and dtype == torch.bfloat16
            assert loaded.transformer.wte.weight.dtype == dtype
            assert loaded.lm_head.weight.dtype == (torch.float64 if half else dtype)
            assert torch.isfinite(loaded(**batch()).loss)


def test_a_model_of_an_architecture_that_is_no_plain_language_model(tmp_path):
    model = replace_lm_head(llava())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(states(from_pretrained(tmp_path)), states(model), rtol=0, atol=0)


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def other_files(folder):
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def without_bias(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["lm_head.bias"]
    save_file(state, file, {"format": "pt"})


class Mine(losses.TaylorSoftmax):
    """A loss of a user, with a name that softsphere does not know."""


class TaylorSoftmax(losses.TaylorSoftmax):
    """A loss of a user, with a name that softsphere knows."""


def tied():
    return replace_lm_head(gpt2(tied=True))


REFUSED = {
    "no output layer": (gpt2, None, {}, "give it one with replace_lm_head"),
    "another shape below": (tied, None, {"n_positions": 16}, r"wpe\.weight"),
    "not tied any more": (
        tied,
        None,
        {"tie_word_embeddings": False},
        "saved with the weight of the input embedding",
    ),
    "tied only now": (
        lambda: with_head("linear"),
        None,
        {"tie_word_embeddings": True},
        "tie_word_embeddings",
    ),
    "no bias": (tied_with_bias, without_bias, {}, r"have no lm_head\.bias.*save_original_format"),
    "a subfolder": (tied, None, {"subfolder": "x"}, "subfolder cannot be given here"),
    "other files": (tied, other_files, {}, "model.safetensors or"),
    "an unknown loss": (lambda: replace_lm_head(gpt2(), Mine()), None, {}, "has the loss '.*Mine'"),
    "a loss that hides ours": (
        lambda: replace_lm_head(gpt2(), TaylorSoftmax()),
        None,
        {},
        r"has the loss '.*\.TaylorSoftmax'",
    ),
    "an unknown layer": (
        tied,
        lambda folder: edited(folder, lambda config: config["softsphere"].update(head="Mine")),
        {},
        "no output layer 'Mine'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused(name, tmp_path):
    make, change, options, words = REFUSED[name]
    make().save_pretrained(tmp_path)
    if change is not None:
        change(tmp_path)
    with pytest.raises(ValueError, match=words):
        from_pretrained(tmp_path, **options)


def test_a_weight_of_its_own_does_not_overwrite_the_embedding():
    """An older transformers may tie what was saved apart."""
    head = HEADS["linear"]()
    with pytest.raises(ValueError, match="saved with a weight of its own"):
        made_again(
            described(head), head.state_dict(), nn.Linear(16, V, **F64), tied=True, cast=False
        )


def test_a_name_on_the_hub_is_no_folder():
    with pytest.raises(ValueError, match="snapshot_download"):
        from_pretrained("gpt2")


@pytest.mark.parametrize("name", ["reduction", "ignore_index", "loss"])
def test_a_head_that_could_not_be_loaded_is_not_saved(name, tmp_path):
    model = replace_lm_head(gpt2())
    values = {"reduction": "sum", "ignore_index": 0, "loss": losses.ZLoss()}
    setattr(model.lm_head, name, values[name])
    with pytest.raises((TypeError, ValueError), match="head must have"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_report_is_of_the_model_below_alone(tmp_path):
    lines: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    transformers.utils.logging.set_verbosity_warning()
    try:
        model = with_head("clustered, projected")
        model.save_pretrained(tmp_path)
        loaded, found = from_pretrained(tmp_path, output_loading_info=True)
        assert not lines and not any(found.values())
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        loaded, found = from_pretrained(
            tmp_path, n_positions=16, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert [key for key, *_ in found["mismatched_keys"]] == ["transformer.wpe.weight"]
        assert "wpe" in lines[0] and "lm_head" not in lines[0] and len(lines) == 1
        lines.clear()
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
        assert "lm_head" in lines[0]
        with_head("linear").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            from_pretrained(tmp_path, tie_word_embeddings=True)
        assert any("NOT tie" in line for line in lines)  # another line of the same logger
    finally:
        logger.removeHandler(handler)
        transformers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_plain_model_of_the_same_config_is_not_taken_for_one_with_a_head(loaded, tmp_path):
    model = gpt2()
    config, kind = model.config, type(model)
    replace_lm_head(model).save_pretrained(tmp_path / "own")
    model = from_pretrained(tmp_path / "own") if loaded else model
    for i, shared in enumerate((config, model.config)):
        kind(shared).save_pretrained(tmp_path / str(i))
        with pytest.raises(ValueError, match="give it one with replace_lm_head"):
            from_pretrained(tmp_path / str(i))
