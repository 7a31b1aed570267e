"""Causal language models of Hugging Face transformers with an output layer of softsphere.

``pip install transformers accelerate`` installs what this module needs.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from torch import nn

from softsphere import losses
from softsphere.heads import LinearSphericalLoss
from softsphere.heads.prediction import OutputLayer
from softsphere.integrations.causal_heads import as_causal_head, check_causal
from softsphere.integrations.causal_lm import CausalLM, class_with_head, own_config
from softsphere.integrations.causal_loading import head_tensors, load_below_head
from softsphere.integrations.causal_probe import check_model
from softsphere.integrations.head_description import made_again
from softsphere.integrations.stale_optimizers import warn_of_stale_optimizers

__all__ = ["from_pretrained", "replace_lm_head"]

_INSTALL = "this needs Hugging Face transformers ({}); pip install transformers accelerate"


def replace_lm_head(model: Any, head: str | losses.Loss | OutputLayer = "taylor_softmax") -> Any:
    """Gives a causal language model an output layer whose training step makes no logits.

    While the model computes a loss from labels, its `lm_head` passes hidden states on, and the
    output layer computes the loss: labels are shifted, −100 is left out, and the sum is divided by
    num_items_in_batch where a trainer gives it. In training mode the output then has no logits. In
    every other call the logits are the log-probabilities of all tokens in float32 or wider, so that
    `generate`, sampling and beam search use the model's own distribution.

    Args:
        model: a `transformers.PreTrainedModel` with a causal language-modelling head, changed in
            place. Do this before the model is compiled or wrapped (peft, DistributedDataParallel),
            and before its optimizer is made. A head with a weight of its own has parameters that
            an older optimizer does not train; such an optimizer warns at its first step.
        head: the name of a loss or a loss, for a `LinearSphericalLoss` that shares the weight of
            the present `lm_head`; or a `LinearSphericalLoss`, `ClusteredLoss` or
            `FactoredSphericalLoss`, which becomes the `lm_head`. Its loss is a distribution, its
            reduction "mean" and its ignore_index −100, and it has no process_group.

    With config.tie_word_embeddings the weight of the head must be that of the input embedding, as
    `LinearSphericalLoss` shares it. Other output layers need config.tie_word_embeddings=False.

    The model gets a config of its own, a copy; other models that were made from the same config
    object keep that. `save_pretrained` and the checkpoints of `Trainer` keep the output layer,
    which config.json describes under `softsphere`, and `from_pretrained` of this module loads it.
    `AutoModelForCausalLM.from_pretrained` would load a model whose logits are the outputs of a
    plain linear layer.

    A call of the model takes num_items_in_batch, shift_labels and ignore_index as the loss of
    transformers does. It refuses label_smoothing, weight and reduction with a TypeError, since
    these are attributes of the output layer. Several threads may call the model at once.

    Returns the model, which keeps its class name and is still an instance of its class.

    Raises TypeError or ValueError, before anything has changed, for a model that does not send the
    outputs of a plain linear layer, unchanged, to the loss of a causal language model (logit
    softcapping, scaled logits, encoder-decoders), and for an output layer that does not fit it.

    >>> import transformers  # doctest: +SKIP
    >>> model = transformers.AutoModelForCausalLM.from_pretrained("gpt2")  # doctest: +SKIP
    >>> replace_lm_head(model, "taylor_softmax")  # doctest: +SKIP
    """
    _transformers()
    if isinstance(model, CausalLM):
        raise TypeError(
            "model has an output layer of softsphere already; load the model again to give it "
            "another one"
        )
    linear = check_model(model)
    layer = _layer(linear, head)
    _check_fit(model, linear, layer)
    own_config(model)
    model.__class__ = class_with_head(model.__class__)
    model.set_output_embeddings(as_causal_head(layer).train(linear.training))
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    kept = {id(p) for p in model.parameters()}
    replaced = [weakref.ref(p) for p in linear.parameters() if id(p) not in kept]
    del linear  # what still holds its parameters is an optimizer, perhaps
    warn_of_stale_optimizers(replaced, layer)
    return model


def from_pretrained(folder: Any, **options: Any) -> Any:
    """Loads a model that `replace_lm_head` was applied to before it was saved.

    Args:
        folder: where `save_pretrained` or a `Trainer` wrote it.
        options: as of `transformers.AutoModelForCausalLM.from_pretrained`. A dtype is also that of
            the output layer, except that a factored weight is never in half precision. Without
            one, the output layer has the dtype in which it was saved.

    Returns the model. With output_loading_info=True, returns it and a dictionary of what was found,
    which says nothing about the output layer, since that is loaded whole or not at all.

    Raises ValueError for a folder without such a model, and for tensors of other shapes than the
    model has, unless ignore_mismatched_sizes=True allows them outside the output layer.
    """
    library = _transformers()
    if not Path(folder).is_dir():
        raise ValueError(
            f"folder must be a folder that save_pretrained has written, got {folder!r}; download a "
            "model from the hub first (huggingface_hub.snapshot_download)"
        )
    config, _ = library.PreTrainedConfig.get_config_dict(folder)
    description = config.get("softsphere")
    if description is None:
        raise ValueError(
            f"{folder} has no output layer of softsphere in its config; load the model by "
            "AutoModelForCausalLM.from_pretrained and give it one with replace_lm_head"
        )
    # The class that was saved, or one that comes with the folder (trust_remote_code).
    kind = getattr(library, config["architectures"][0], library.AutoModelForCausalLM)
    model, found = load_below_head(kind.from_pretrained, folder, options)
    dtype = options.get("dtype", options.get("torch_dtype"))
    head = made_again(
        description,
        head_tensors(folder, options.get("variant")),
        model.get_output_embeddings(),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        cast=dtype not in (None, "auto"),
    )
    replace_lm_head(model, head)
    return (model, found) if options.get("output_loading_info") else model


def _layer(linear: nn.Linear, head: str | losses.Loss | OutputLayer) -> OutputLayer:
    """The output layer that the argument `head` stands for."""
    if isinstance(head, str) and head not in losses.REGISTRY:
        raise ValueError(f"head must be one of {', '.join(losses.REGISTRY)}, got {head!r}")
    if isinstance(head, (str, losses.Loss)):
        head = LinearSphericalLoss.from_linear(linear, head)
    check_causal(head)
    return head


def _check_fit(model: Any, linear: nn.Linear, head: Any) -> None:
    """Raises ValueError unless the head can replace this lm_head."""
    sizes = (head.in_features, head.num_classes)
    wanted = (linear.weight.shape[1], linear.weight.shape[0])
    if sizes != wanted:
        raise ValueError(
            f"head must have in_features={wanted[0]} and num_classes={wanted[1]}, as the lm_head "
            f"of this model has, got {sizes[0]} and {sizes[1]}"
        )
    if head.weight.device != linear.weight.device:
        raise ValueError(
            f"head must be on the device of the lm_head, {linear.weight.device}, got "
            f"{head.weight.device}"
        )
    tied = bool(model.get_expanded_tied_weights_keys(all_submodels=True))
    shared = head.weight is model.get_input_embeddings().weight
    if tied and not shared:
        raise ValueError(
            "config.tie_word_embeddings is True, but head has a weight of its own; use "
            "LinearSphericalLoss.from_linear(model.get_output_embeddings()) to keep them tied, or "
            "set model.config.tie_word_embeddings = False first to train them apart"
        )
    if shared and not tied:
        raise ValueError(
            "head shares the weight of the input embedding, but config.tie_word_embeddings is "
            "False, so that a saved model would not; set it True first, or give head its own weight"
        )


def _transformers() -> Any:
    """Returns the library, which is imported only when it is used."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_INSTALL.format(error)) from error
    return transformers
