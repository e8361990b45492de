"""The linear layers of a transformer, by layer and by what they take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

ATTENTION_INPUT, ATTENTION_OUTPUT = "attention input", "attention output"
FEED_FORWARD_INPUT, FEED_FORWARD_HIDDEN = "feed-forward input", "feed-forward hidden"
# The paper ignores the contraction layer of the feed-forward: there it saw no outlier features.
HIDDEN_STATES = (ATTENTION_INPUT, ATTENTION_OUTPUT, FEED_FORWARD_INPUT)

# Query, key and value, and what is behind attention, as the architectures of transformers call them.
_TAKES_ATTENTION_INPUT = re.compile(
    r"(^|\.)(q_proj|k_proj|v_proj|qkv_proj|query|key|value|query_key_value|c_attn|Wqkv|qkv|in_proj|[qkv]_lin)$"
)
_TAKES_ATTENTION_OUTPUT = re.compile(r"(attn|attention)[^.]*\.(.*\.)?(out_proj|o_proj|c_proj|dense|Wo|out_lin)$")


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer inside a transformer layer."""

    layer: int
    name: str  # within its layer
    takes: str  # one of the four inputs above
    module: nn.Linear


def projections(model: Any) -> list[Projection]:
    """Every linear layer of the transformer layers, in the model's order.

    The transformer layers are the `nn.ModuleList` with the most parameters. A linear layer whose input is not as wide
    as the hidden states is the contraction of the feed-forward.

    Raises ValueError where there are no such layers.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=nn.ModuleList())
    found = [
        Projection(index, name, _takes(name, module, model.config.hidden_size), module)
        for index, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not found:
        raise ValueError(f"model: expected transformer layers with linear layers, got {type(model).__name__} without")
    return found


def _takes(name: str, module: nn.Linear, width: int) -> str:
    if _TAKES_ATTENTION_OUTPUT.search(name):
        return ATTENTION_OUTPUT
    if _TAKES_ATTENTION_INPUT.search(name):
        return ATTENTION_INPUT
    return FEED_FORWARD_INPUT if module.in_features == width else FEED_FORWARD_HIDDEN
