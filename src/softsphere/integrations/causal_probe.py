"""What a language model must do for its output layer to be replaced, found by one short call."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from softsphere.heads.adoption import plain_parameters

__all__ = ["check_model"]

_LOSS = "ForCausalLMLoss"


def check_model(model: Any) -> nn.Linear:
    """Returns the lm_head of a model whose output layer can be replaced.

    The model is called once with two tokens, in evaluation mode, so that its random numbers stay
    as they are. Nothing of it is changed.

    Raises TypeError or ValueError for every other model.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {name}; replace the head before "
            "the model is wrapped, and give the model inside"
        )
    linear: Any = model.get_output_embeddings()
    causal = "labels" in inspect.signature(model.forward).parameters
    named = linear is not None and getattr(model, "lm_head", None) is linear
    if model.config.is_encoder_decoder or not named or not causal:
        raise TypeError(
            f"model must be a causal language model with an lm_head, such as GPT2LMHeadModel or "
            f"LlamaForCausalLM, got {name}"
        )
    try:
        plain_parameters(linear)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the lm_head cannot be replaced: {error}") from error
    if linear.weight.is_meta:
        raise ValueError("model must have values, but its lm_head is on the meta device")
    loss = getattr(model.loss_function, "__name__", repr(model.loss_function))
    if loss != _LOSS:
        raise TypeError(
            f"model must have the loss of a causal language model, {_LOSS}, but that of this "
            f"{name} is {loss}"
        )
    _check_outputs(model, linear)
    lm_head: nn.Linear = linear
    return lm_head


class _ReachedLossError(Exception):
    """Ends the call once the loss has been reached."""


def _check_outputs(model: Any, linear: nn.Linear) -> None:
    """Raises TypeError unless the loss receives the outputs of the lm_head as they are."""
    name, marked = type(model).__name__, []
    seen: list[Tensor] = []

    def mark(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        marked.append(
            torch.linspace(1, 2, output.numel(), device=output.device).to(output).view(output.shape)
        )
        return marked[-1]

    def loss(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(logits)
        raise _ReachedLossError

    modes = [(module, module.training) for module in model.modules()]
    tokens = torch.zeros(1, 2, dtype=torch.long, device=linear.weight.device)
    hook = linear.register_forward_hook(mark)
    kept = vars(model).get("_loss_function")
    model.loss_function = loss
    try:
        with torch.no_grad():
            model.eval()(input_ids=tokens, labels=tokens)
    except _ReachedLossError:
        pass
    finally:
        hook.remove()
        del model._loss_function
        if kept is not None:
            model.loss_function = kept
        for module, mode in modes:
            module.training = mode
    if not seen or len(marked) != 1:
        raise TypeError(
            f"model must call its lm_head once and give the outputs to its loss_function, but this "
            f"{name} called the one {len(marked)} times and the other {len(seen)} times"
        )
    if seen[0].shape != marked[0].shape or not torch.equal(seen[0].to(marked[0]), marked[0]):
        raise TypeError(
            f"model must give the outputs of its lm_head to the loss as they are, but this {name} "
            "changes them (final_logit_softcapping, logit_scale, logits_scaling or the like), for "
            "which no output layer without logits has a loss; switch that off in model.config, if "
            "the model is to be trained so"
        )
