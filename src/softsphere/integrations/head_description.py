"""An output layer as a description in a model's config, and made again from a saved model."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import losses
from softsphere.engines import LinearSphericalOptions
from softsphere.heads import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss
from softsphere.heads.prediction import OutputLayer
from softsphere.integrations.causal_heads import plain_twin

__all__ = ["described", "made_again"]

_FACTORED = (torch.float32, torch.float64)


def described(head: Any) -> dict[str, Any]:
    """What `made_again` needs besides the tensors, as numbers and names that JSON can hold."""
    kinds = (LinearSphericalLoss, ClusteredLoss, FactoredSphericalLoss)
    kind = next(kind for kind in kinds if isinstance(head, kind))
    found: dict[str, Any] = {"head": kind.__name__, "loss": _described_loss(head.loss)}
    found["tensors"] = sorted(head.state_dict())
    if isinstance(head, LinearSphericalLoss):
        options = asdict(head.options)
        options["accumulate_dtype"] = str(head.options.accumulate_dtype).removeprefix("torch.")
        found |= {"label_smoothing": head.label_smoothing, "options": options}
    if isinstance(head, ClusteredLoss):
        width = None if head.project is None else head.leaf_width
        found |= {"engine": head.engine, "sparse": head.sparse, "leaf_features": width}
    return found


def made_again(
    description: dict[str, Any], state: dict[str, Tensor], linear: nn.Linear, tied: bool, cast: bool
) -> OutputLayer:
    """Makes the output layer of a saved model.

    Args:
        description: what `described` returned.
        state: the tensors of the output layer.
        linear: the lm_head of the model that transformers has loaded, in whose place it comes.
        tied: whether linear has the weight of the input embedding, which the output layer shares.
        cast: whether the output layer has the dtype of linear, and not the dtype of its tensors.

    Raises ValueError for a loss that softsphere does not have, and for tensors that do not fit.
    """
    description = dict(description)
    kind, loss = description.pop("head"), _loss(description.pop("loss"))
    state = _whole(state, description.pop("tensors"), linear, tied)
    D, d = linear.weight.shape
    prior, dtype = state.get("prior"), state["weight"].dtype
    factored = kind == "FactoredSphericalLoss" or description.get("engine") == "factored"
    if cast and not (factored and linear.weight.dtype not in _FACTORED):
        dtype = linear.weight.dtype
    made: dict[str, Any] = {"device": linear.weight.device, "dtype": dtype}
    head: Any
    if kind == "ClusteredLoss":
        head = ClusteredLoss(
            d, D, state["assignment"], leaf=loss, bias="root.bias" in state, **description, **made
        )
    elif kind == "FactoredSphericalLoss":
        head = FactoredSphericalLoss(d, D, loss, "bias" in state, prior, **made)
    elif kind == "LinearSphericalLoss":
        options = dict(description.pop("options"))
        options["accumulate_dtype"] = getattr(torch, options["accumulate_dtype"])
        description |= {"weight": state.get("class_weight")}
        W: Any = linear.weight if tied else nn.Parameter(torch.empty(D, d, **made))
        b = nn.Parameter(torch.empty(D, **made)) if "bias" in state else None
        head = LinearSphericalLoss.from_linear(
            plain_twin(W, b), loss, prior, options=LinearSphericalOptions(**options), **description
        )
    else:
        raise ValueError(f"there is no output layer {kind!r} for a language model")
    head.load_state_dict(state)
    layer: OutputLayer = head
    return layer


def _whole(
    state: dict[str, Tensor], names: list[str], linear: nn.Linear, tied: bool
) -> dict[str, Tensor]:
    """The tensors with the weight, which was not saved if it is that of the input embedding.

    Raises ValueError if one of these names is missing, or if another weight was saved.
    """
    weight = state.get("weight")
    if weight is None and not tied:
        raise ValueError(
            "the output layer was saved with the weight of the input embedding, which the loaded "
            "model does not share; load it with the tie_word_embeddings of its own config"
        )
    if weight is not None and tied and not torch.equal(weight.to(linear.weight), linear.weight):
        raise ValueError(
            "the output layer was saved with a weight of its own, but the loaded model shares that "
            "of the input embedding; load it with the tie_word_embeddings of its own config"
        )
    whole = {**state, "weight": linear.weight.detach()} if tied else state
    missing = ", ".join(f"lm_head.{name}" for name in names if name not in whole)
    if missing:
        raise ValueError(
            f"the files of the saved model have no {missing}; they must be as save_pretrained of "
            "the model writes them by default, with save_original_format=False"
        )
    return whole


def _described_loss(loss: losses.Loss) -> dict[str, Any]:
    kind = type(loss)
    if getattr(losses, kind.__name__, None) is not kind:
        return {"name": f"{kind.__module__}.{kind.__qualname__}"}
    return {"name": kind.__name__, **{x.name: getattr(loss, x.name) for x in fields(loss)}}


def _loss(description: dict[str, Any]) -> losses.Loss:
    description = dict(description)
    name = description.pop("name")
    kind = getattr(losses, name, None) if name in losses.__all__ else None
    if kind is None:
        raise ValueError(
            f"the saved model has the loss {name!r}, which softsphere.losses does not have; load "
            "the state_dict() of the model into one that replace_lm_head gave that loss"
        )
    loss: losses.Loss = kind(**description)
    return loss
