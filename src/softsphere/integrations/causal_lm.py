"""What a causal language model does differently once it has an output layer of softsphere."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from torch import Tensor

from softsphere.heads import LinearSphericalLoss
from softsphere.integrations.causal_heads import (
    CausalHead,
    causal_lm_loss,
    check_conventions,
    plain_twin,
)
from softsphere.integrations.head_description import described

__all__ = ["CausalLM", "class_with_head", "own_config"]

# Arguments of F.cross_entropy that transformers passes on to its loss, which ignores them.
_OF_THE_HEAD = ("label_smoothing", "weight", "reduction")

# What a subclass of CausalLM derives from besides: the class of a model.
_Model: Any = object


class CausalLM(_Model):
    """A model with an output layer of softsphere.

    A subclass of this class and of the model's own class is made for each of them.
    """

    plain_class: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        raise TypeError(
            f"a {type(self).__name__} with an output layer of softsphere cannot be made from a "
            "config alone, or by the from_pretrained of its class; give the layer to a plain model "
            "with replace_lm_head, or load a saved model with "
            "softsphere.integrations.transformers.from_pretrained"
        )

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
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        for name in _OF_THE_HEAD:
            if name in others:
                raise TypeError(
                    f"{name} cannot be given to a call of the model, got {others[name]!r}; the "
                    "output layer computes the loss, so make that with it (LinearSphericalLoss "
                    "has weight and label_smoothing)"
                )
        head = self._causal_head()
        return causal_lm_loss(head, logits, labels, num_items_in_batch, shift_labels, ignore_index)

    def _with_labels(self, forward: Any, *args: Any, **options: Any) -> Any:
        """The outputs of a call with labels, whose logits are hidden states on their way."""
        as_dict = options.pop("return_dict", None)  # None stands for that of the config
        if as_dict is None:
            as_dict = getattr(self.config, "return_dict", True)
        head = self._causal_head()
        with head.passing():
            outputs = forward(self, *args, return_dict=True, **options)
        logits = None if self.training else head(outputs.logits)
        outputs = type(outputs)(**{**outputs, "logits": logits})
        return outputs if as_dict else outputs.to_tuple()

    def _causal_head(self) -> CausalHead:
        head = self.get_output_embeddings()
        if not isinstance(head, CausalHead):
            raise TypeError(
                f"the lm_head of this model must stay the output layer that replace_lm_head gave "
                f"it, but it is {type(head).__name__} now; load the model again to give it another "
                "one"
            )
        return head

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """See `transformers.PreTrainedModel.save_pretrained`.

        save_original_format is False by default, so that all tensors have the names of the model:
        the original names of some architectures, such as embed_out for lm_head, would be those of
        a plain lm_head alone.

        Raises TypeError or ValueError, before anything is written, for an output layer that
        `from_pretrained` could not make again.
        """
        head = self._causal_head()
        check_conventions(head)
        options.setdefault("save_original_format", False)
        # Only what is saved is marked: a plain model may be made from this config.
        self.config.softsphere = described(head)
        try:
            return super().save_pretrained(save_directory, *args, **options)
        finally:
            del self.config.softsphere

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
                f"the tokens of a {type(head).__name__} cannot be resized; resize the model before "
                "replace_lm_head"
            )
        if head.prior is not None or head.class_weight is not None:
            raise ValueError(
                "the tokens of a head with a prior or class weights cannot be resized, since the "
                "new tokens have none; resize the model before replace_lm_head"
            )
        self.set_output_embeddings(plain_twin(head.weight, head.bias))
        try:
            embedding = resize(new_num_tokens, *args, **options)
        finally:
            linear = self.get_output_embeddings()
            head.weight, head.bias = linear.weight, linear.bias
            self.set_output_embeddings(head)
        return embedding

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _without_state, (self.plain_class,), self.__dict__


@functools.cache
def class_with_head(base: Any) -> Any:
    """A subclass of a model's class whose calls with labels compute the loss of the head."""
    names = list(inspect.signature(base.forward).parameters)
    place = names.index("labels") - 1

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        labels = args[place] if len(args) > place else options.get("labels")
        if labels is None:
            return base.forward(self, *args, **options)
        return self._with_labels(base.forward, *args, **options)

    own = {"forward": forward, "plain_class": base}
    own |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (CausalLM, base), own)


def _without_state(base: Any) -> Any:
    """A model without a state, for pickle and copy."""
    kind = class_with_head(base)
    return kind.__new__(kind)


def own_config(model: Any) -> None:
    """Gives a model a config that no other model has.

    All models that were made from one config object have that object, and so have their submodules.
    The submodules of this model that have it, or a part of it, get the new one or that part of it.
    """
    from transformers import PreTrainedConfig

    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(module)[name] = copies[id(value)]
    vars(model.config).pop("softsphere", None)  # what a saved model had
