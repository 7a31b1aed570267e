"""A loss of torchtitan 0.3 that takes hidden states and computes no logits."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torchtitan.components.loss import ChunkedLossWrapper
except ImportError as error:
    raise ImportError(f"this needs torchtitan ({error}); pip install torchtitan") from error

from softsphere import losses
from softsphere._torch import is_dtensor
from softsphere.functional import linear_spherical_loss

__all__ = ["LinearLoss"]


class LinearLoss(ChunkedLossWrapper):  # type: ignore[misc, unused-ignore]
    """A spherical loss of the model's lm_head, summed over tokens as torchtitan's losses are.

    Set ``Trainer.Config(loss=LinearLoss.Config(loss="taylor_softmax"), …)``. Raises TypeError for
    an lm_head that computes more than W h + b, and in the first step under tensor parallelism.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):  # type: ignore[misc, unused-ignore]
        loss: str = "taylor_softmax"

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.loss = losses.get(config.loss)

    def set_lm_head(self, lm_head: nn.Module) -> None:
        forward = getattr(getattr(lm_head, "forward", None), "__func__", None)
        if not isinstance(lm_head, nn.Linear) or forward is not nn.Linear.forward:
            raise TypeError(f"lm_head must be a plain nn.Linear, got {type(lm_head).__name__}")
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Any = None, **others: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # inside its forward, since fully_shard has the whole weight there alone
        self.lm_head.forward = partial(self._sum, labels=labels)  # type: ignore[method-assign]
        try:
            loss = self.lm_head(pred)
        finally:
            del self.lm_head.forward  # the layer computes outputs again, as for an evaluation
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}

    def _sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        W, b = self.lm_head.weight, self.lm_head.bias
        if is_dtensor(W) or len(W) != self.lm_head.out_features:
            raise TypeError("LinearLoss needs a whole lm_head; set tensor_parallel_degree to 1")
        # autocast returns the sum in float32, where a half precision would round it
        half, given = (
            hidden.dtype in (torch.float16, torch.bfloat16),
            (hidden, W, labels, self.loss),
        )
        with torch.autocast(hidden.device.type, hidden.dtype if half else None, enabled=half):
            return linear_spherical_loss(*given, linear_bias=b, reduction="sum")
