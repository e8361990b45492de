"""A step of a causal language model over several texts at once, side by side in one row, without padding.

All layers but attention work on each token by itself, so the tokens of all texts go through them in one call: the
linear layers read their weights once for all. Attention is computed text by text, over the text's own keys and values,
by the very function that `generate` uses. So nothing that a text computes depends on which others are beside it, as
long as the linear layers keep to that too: int8 layers do under outliers="rows" and "static" (`loading.independent_`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "octavo_ragged"


@dataclass
class Text:
    """A text that grows: the tokens that the model is still to read, and what it keeps of those that it has read."""

    unread: list[int]
    read: int = 0
    cache: DynamicCache = field(default_factory=DynamicCache)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    texts: Sequence[Text] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Query, key and value ``[1, heads, tokens of all texts, d]`` -> ``[1, tokens of all texts, heads, d]``."""
    if texts is None:
        raise RuntimeError(f"{type(module).__name__}: expected the texts of `step`, got none: the model dropped them")
    more.pop("sliding_window", None)  # `prepare_` has seen to it that no text outgrows it
    results, begin = [], 0
    for text in texts:
        own = slice(begin, begin + len(text.unread))
        keys, values = text.cache.update(key[:, :, own], value[:, :, own], module.layer_idx)
        results.append(sdpa_attention_forward(module, query[:, :, own], keys, values, None, **more)[0])
        begin = own.stop
    return torch.cat(results, dim=1), None


AttentionInterface.register(ATTENTION, _attention)


@torch.inference_mode()
def step(model: Any, texts: Sequence[Text]) -> Tensor:
    """The model reads what is unread; returns the logits of the token after each text, float32 ``[texts, words]``."""
    ids = torch.tensor([[token for text in texts for token in text.unread]])
    positions = torch.tensor([[text.read + i for text in texts for i in range(len(text.unread))]])
    last = torch.tensor([len(text.unread) for text in texts]).cumsum(0) - 1
    outputs = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last, texts=texts)
    for text in texts:
        text.read += len(text.unread)
        text.unread = []
    logits: Tensor = outputs.logits[0].float()
    return logits


def prepare_(model: Any) -> int:
    """Switch a model to `step`; returns the most tokens that a text may have.

    Raises ValueError for models whose attention cannot be replaced, or that keep another state than keys and values.
    """
    config = model.config
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"model: expected one whose attention Transformers can replace, got {config.model_type}")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"model: expected layers of attention only, got {config.model_type} with {kind}")
    model.set_attn_implementation(ATTENTION)
    limits = (getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None))
    return min([int(limit) for limit in limits if limit] or [2048])
