"""Causal language models of Hugging Face transformers with an output layer of softsphere.

``pip install 'softsphere[transformers]'`` installs what this module needs.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softsphere import losses
from softsphere.heads import LinearSphericalLoss
from softsphere.heads.prediction import OutputLayer
from softsphere.integrations.causal_heads import (
    CausalHead,
    as_causal_head,
    causal_lm_loss,
    check_causal,
)
from softsphere.integrations.causal_probe import check_model
from softsphere.integrations.head_description import described, load_head

__all__ = ["from_pretrained", "replace_lm_head"]

_INSTALL = "this needs Hugging Face transformers ({}); pip install 'softsphere[transformers]'"


def replace_lm_head(model: Any, head: str | losses.Loss | OutputLayer = "taylor_softmax") -> Any:
    """Gives a causal language model an output layer whose training step makes no logits.

    While the model computes a loss from labels, its `lm_head` passes hidden states on, and the
    output layer computes the loss: labels are shifted, −100 is left out, and the sum is divided by
    num_items_in_batch where a trainer gives it. In training mode the output then has no logits. In
    every other call the logits are the log-probabilities of all tokens in float32 or wider, so that
    `generate`, sampling and beam search use the model's own distribution.

    Args:
        model: a `transformers.PreTrainedModel` with a causal language-modelling head, changed in
            place. Do this before the model is compiled or wrapped (peft, DistributedDataParallel).
        head: the name of a loss or a loss, for a `LinearSphericalLoss` that shares the weight of
            the present `lm_head`; or a `LinearSphericalLoss`, `ClusteredLoss` or
            `FactoredSphericalLoss`, which becomes the `lm_head`. Its loss is a distribution, its
            reduction "mean" and its ignore_index −100.

    With config.tie_word_embeddings the weight of the head must be that of the input embedding, as
    `LinearSphericalLoss` shares it. Other output layers need config.tie_word_embeddings=False.

    `save_pretrained` and the checkpoints of `Trainer` keep the output layer, and `from_pretrained`
    of this module loads it. The config describes it under `softsphere`.
    `AutoModelForCausalLM.from_pretrained` would load a model whose logits are the outputs of a
    plain linear layer.

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
    if not isinstance(head, OutputLayer):
        head = LinearSphericalLoss.from_linear(linear, head)
    check_causal(head)
    _check_fit(model, linear, head)
    model.__class__ = _class_with_head(model.__class__)
    model.set_output_embeddings(as_causal_head(head))
    model.config.softsphere = described(head)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def from_pretrained(folder: Any, **options: Any) -> Any:
    """Loads a model that `replace_lm_head` was applied to before it was saved.

    Args:
        folder: where `save_pretrained` or a `Trainer` wrote it.
        options: as of `transformers.AutoModelForCausalLM.from_pretrained`.

    Raises ValueError for a folder without such a model.
    """
    library = _transformers()
    if not Path(folder).is_dir():
        raise ValueError(
            f"folder must be a folder that save_pretrained has written, got {folder!r}; download a "
            "model from the hub first (huggingface_hub.snapshot_download)"
        )
    description = getattr(library.AutoConfig.from_pretrained(folder), "softsphere", None)
    if description is None:
        raise ValueError(
            f"{folder} has no output layer of softsphere in its config; load the model by "
            "AutoModelForCausalLM.from_pretrained and give it one with replace_lm_head"
        )
    load = library.AutoModelForCausalLM.from_pretrained
    model = load(folder, **options, ignore_mismatched_sizes=True)
    return replace_lm_head(model, load_head(folder, description, model.get_output_embeddings()))


# What a subclass of CausalLM derives from besides: the class of a model.
_Model: Any = object


class CausalLM(_Model):
    """What a model with an output layer of softsphere does differently from its own class.

    A subclass of this class and of the model's own class is made for each of them.
    """

    @property
    def loss_function(self) -> Any:
        return self._loss_of_hidden

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        raise TypeError(
            "loss_function cannot be set for a model whose loss is that of its output layer; "
            "compute another loss from the logits of a call without labels"
        )

    def _loss_of_hidden(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        head = self._causal_head()
        return causal_lm_loss(head, logits, labels, num_items_in_batch, shift_labels)

    def _with_labels(self, forward: Any, *args: Any, **options: Any) -> Any:
        """The outputs of a call with labels, whose logits are hidden states on their way."""
        as_tuple = not options.pop("return_dict", getattr(self.config, "return_dict", True))
        head = self._causal_head()
        with head.passing():
            outputs = forward(self, *args, return_dict=True, **options)
        logits = None if self.training else head(outputs.logits)
        outputs = type(outputs)(**{**outputs, "logits": logits})
        return outputs.to_tuple() if as_tuple else outputs

    def _causal_head(self) -> CausalHead:
        head = self.get_output_embeddings()
        assert isinstance(head, CausalHead)
        return head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **options: Any
    ) -> Any:
        """See `transformers.PreTrainedModel.resize_token_embeddings`.

        Raises TypeError or ValueError, before anything has changed, for an output layer whose
        classes cannot be changed.
        """
        head: Any = self._causal_head()
        resize = super().resize_token_embeddings
        if new_num_tokens is None and not (args or options.get("pad_to_multiple_of")):
            return resize(new_num_tokens, *args, **options)
        if not isinstance(head, LinearSphericalLoss):
            raise TypeError(
                f"the tokens of a {type(head).__mro__[2].__name__} cannot be resized; resize the "
                "model before replace_lm_head"
            )
        if head.prior is not None or head.class_weight is not None:
            raise ValueError(
                "the tokens of a head with a prior or class weights cannot be resized, since the "
                "new tokens have none; resize the model before replace_lm_head"
            )
        # A plain linear layer of the same parameters is resized in its place.
        linear: Any = nn.Linear(1, 1, bias=head.bias is not None, device="meta")
        linear.weight, linear.bias = head.weight, head.bias
        linear.out_features, linear.in_features = head.weight.shape
        self.set_output_embeddings(linear)
        try:
            embedding = resize(new_num_tokens, *args, **options)
        finally:
            linear = self.get_output_embeddings()
            head.weight, head.bias = linear.weight, linear.bias
            self.set_output_embeddings(head)
        return embedding

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _class_with_head(base: Any) -> Any:
    """A subclass of a model's class whose calls with labels compute the loss of the head."""
    names = list(inspect.signature(base.forward).parameters)
    place = names.index("labels") - 1

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        labels = args[place] if len(args) > place else options.get("labels")
        if labels is None:
            return base.forward(self, *args, **options)
        return self._with_labels(base.forward, *args, **options)

    own = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (CausalLM, base), own)


def _empty(base: Any) -> Any:
    """A model without a state, for pickle and copy."""
    kind = _class_with_head(base)
    return kind.__new__(kind)


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
