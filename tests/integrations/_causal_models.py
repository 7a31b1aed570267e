"""Tiny causal language models of transformers, made from configs alone, in float64, and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softsphere import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss
from softsphere.integrations.transformers import replace_lm_head

transformers = pytest.importorskip("transformers")

V, N = 40, 8  # tokens, and the length of a text
_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": V,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32, "vocab_size": V}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
_HEADS = {"num_key_value_heads": 2}
_OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
_OPT |= {"num_attention_heads": 2, "max_position_embeddings": 32, "vocab_size": V}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout")


def made(name: str, **options: Any) -> Any:
    """A model without dropout, with the same random weights each time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    for dropout in _DROPOUTS:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, kind)(config).double()
    with torch.no_grad():
        for p in model.parameters():  # outputs of a size at which losses differ
            p.mul_(4)
    return model.train()


# Each architecture, and whether the weight of its lm_head is that of its embedding.
ARCHITECTURES: dict[str, tuple[Callable[[], Any], bool]] = {
    "GPT-2": (lambda: made("GPT2", **_GPT2), True),
    "Llama": (lambda: made("Llama", **_SIZES, **_HEADS), False),
    "Qwen2": (lambda: made("Qwen2", **_SIZES, **_HEADS, tie_word_embeddings=True), True),
    "Gemma": (lambda: made("Gemma", **_SIZES, **_HEADS, head_dim=8), True),
    "Gemma 2": (
        lambda: made("Gemma2", **_SIZES, **_HEADS, head_dim=8, final_logit_softcapping=None),
        True,
    ),
    "OPT": (lambda: made("OPT", **_OPT), True),
    "GPT-NeoX": (lambda: made("GPTNeoX", **_SIZES), False),
    "Phi": (lambda: made("Phi", **_SIZES), False),  # its lm_head has a bias
}


def gpt2(tied: bool = False) -> Any:
    model = ARCHITECTURES["GPT-2"][0]()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def llava() -> Any:
    """A model whose submodules have parts of its config."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = transformers.CLIPVisionConfig(
        **sizes, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16
    )
    text = ARCHITECTURES["Llama"][0]().config
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration(config).double()


COUNTS = torch.arange(1.0, V + 1)
ASSIGNMENT = torch.arange(V) % 6 - 1
F64 = {"dtype": torch.float64}
HEADS: dict[str, Callable[[], Any]] = {
    "linear": lambda: LinearSphericalLoss(16, V, prior=COUNTS, **F64),
    "linear, smoothed": lambda: LinearSphericalLoss(
        16, V, "spherical_softmax", False, weight=COUNTS, label_smoothing=0.1, **F64
    ),
    "clustered": lambda: ClusteredLoss(16, V, ASSIGNMENT, counts=COUNTS, **F64),
    "clustered, projected": lambda: ClusteredLoss(
        16, V, ASSIGNMENT, leaf="softmax", leaf_features=4, bias=False, **F64
    ),
    "factored": lambda: FactoredSphericalLoss(16, V, prior=COUNTS, **F64),
}


def with_head(kind: str) -> Any:
    torch.manual_seed(1)
    return replace_lm_head(gpt2(), HEADS[kind]())


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def near(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def batch(seed: int = 0, rows: int = 2) -> dict[str, Tensor]:
    """Tokens, and labels with some −100."""
    tokens = torch.randint(V, (rows, N), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :3] = labels[:, 5] = -100
    return {"input_ids": tokens, "labels": labels}


def taylor_log_prob(o: Tensor) -> Tensor:
    numerators = 1 + o + o * o / 2
    return (numerators / numerators.sum(-1, keepdim=True)).log()


def nll(log_prob: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
    """The sum of −log p of the next tokens, divided by their number or by another one."""
    each = [
        -row[i, target]
        for row, tokens in zip(log_prob, labels.tolist(), strict=True)
        for i, target in enumerate(tokens[1:])
        if target != -100
    ]
    return torch.stack(each).sum() / (len(each) if num_items is None else num_items)
