"""An output layer as a description in a model's config, and made again from a saved model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softsphere import losses
from softsphere.heads import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss
from softsphere.heads.prediction import OutputLayer

__all__ = ["described", "load_head"]


def described(head: Any) -> dict[str, Any]:
    """What `load_head` needs besides the tensors, as numbers and names that JSON can hold."""
    kinds = (LinearSphericalLoss, ClusteredLoss, FactoredSphericalLoss)
    kind = next(kind for kind in kinds if isinstance(head, kind))
    loss = {field.name: getattr(head.loss, field.name) for field in fields(head.loss)}
    found: dict[str, Any] = {
        "head": kind.__name__,
        "loss": {"name": type(head.loss).__name__, **loss},
    }
    if isinstance(head, LinearSphericalLoss):
        found["label_smoothing"] = head.label_smoothing
    if isinstance(head, ClusteredLoss):
        width = None if head.project is None else head.leaf_width
        found |= {"engine": head.engine, "sparse": head.sparse, "leaf_features": width}
    return found


def load_head(folder: Any, description: dict[str, Any], linear: nn.Linear) -> OutputLayer:
    """Makes the output layer of a saved model.

    Args:
        folder: where the model was saved.
        description: what `described` returned.
        linear: the lm_head of the model that transformers has loaded, whose weight is right if the
            output layer has one of the same shape.

    Raises ValueError for a loss that softsphere does not have.
    """
    description = dict(description)
    kind, loss = description.pop("head"), _loss(dict(description.pop("loss")))
    state = _head_tensors(folder)
    D, d = linear.weight.shape
    made: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    prior, bias = state.get("prior"), "bias" in state
    head: Any
    if kind == "ClusteredLoss":
        head = ClusteredLoss(
            d, D, state["assignment"], leaf=loss, bias="root.bias" in state, **description, **made
        )
    elif kind == "FactoredSphericalLoss":
        made["dtype"] = state["weight"].dtype  # a factored weight is never in half precision
        head = FactoredSphericalLoss(d, D, loss, bias, prior, **made)
    elif kind == "LinearSphericalLoss":
        weight = state.get("class_weight")
        description |= {"weight": weight}
        if bias == (linear.bias is not None):
            head = LinearSphericalLoss.from_linear(linear, loss, prior, **description)
        else:
            head = LinearSphericalLoss(d, D, loss, bias, prior, **description, **made)
    else:
        raise ValueError(f"there is no output layer {kind!r} for a language model")
    # A tied weight is saved as that of the input embedding alone.
    missing, unexpected = head.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"weight"}, (missing, unexpected)
    made_again: OutputLayer = head
    return made_again


def _loss(description: dict[str, Any]) -> losses.Loss:
    name = description.pop("name")
    kind = getattr(losses, name, None) if name in losses.__all__ else None
    if kind is None:
        raise ValueError(
            f"the saved model has the loss {name!r}, which softsphere.losses does not have; load "
            "it by AutoModelForCausalLM.from_pretrained and use replace_lm_head with that loss"
        )
    loss: losses.Loss = kind(**description)
    return loss


def _head_tensors(folder: Any) -> dict[str, Tensor]:
    """The tensors of the lm_head in the safetensors files of a folder."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is not a dict)
                if key.startswith("lm_head."):
                    found[key.removeprefix("lm_head.")] = tensors.get_tensor(key)
    return found
