"""Reading and changing the linear layers of a model that somebody else wrote."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def copy_modules(model: nn.Module) -> Any:
    """A copy whose modules can be replaced without touching `model`. The tensors are shared: never write to them."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Each linear layer but the output head, which makes logits, and its qualified name, converted or not."""
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def linear_bytes(model: nn.Module) -> int:
    """Bytes that the linear layers hold: weights, scales, kept outlier weights, biases. Of octavo's and of peers'.

    With the output head where it is int8, since one that is not may be the embedding.
    """
    total = 0
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [head] if hasattr(getattr(head, "weight", None), "int8_weight") else []
    for module in [*(module for _, module in linear_layers(model)), *heads]:
        total += _bytes(getattr(module.weight, "int8_weight", module.weight)) + _bytes(module.bias)
        # bitsandbytes' scales move from the weight to the state in the first call.
        owners = (module.weight, getattr(module, "state", None))
        total += max(_bytes(getattr(owner, "SCB", None)) for owner in owners)
    return total


def _bytes(held: Any) -> int:
    if held is None:
        return 0
    if isinstance(held, Tensor) and hasattr(held, "__tensor_flatten__"):  # a subclass that wraps others
        return sum(_bytes(getattr(held, part)) for part in held.__tensor_flatten__()[0])
    return int(held.nbytes)


@contextmanager
def hooked(modules: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """While it lasts, each module calls its hook before it runs."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rows_at_a_time(model: nn.Module, rows: int | None) -> Iterator[None]:
    """While it lasts, each linear layer takes its tokens in calls of `rows`, as in decoding; None: all at once."""
    layers = [layer for _, layer in linear_layers(model)] if rows else []

    def split(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        parts = x.flatten(0, -2).split(rows or len(x))
        y = torch.cat([forward(part) for part in parts])
        return y.view(*x.shape[:-1], -1)

    for layer in layers:
        vars(layer)["forward"] = partial(split, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


ATTENTION_INPUT, ATTENTION_OUTPUT = "attention input", "attention output"
FEED_FORWARD_INPUT, FEED_FORWARD_HIDDEN = "feed-forward input", "feed-forward hidden"
# The paper ignores the contraction layer of the feed-forward: there it saw no outlier features.
HIDDEN_STATES = (ATTENTION_INPUT, ATTENTION_OUTPUT, FEED_FORWARD_INPUT)

# Query, key and value, and what is behind attention, as the architectures of transformers call them.
_TAKES_ATTENTION_INPUT = re.compile(
    r"(^|\.)(q_proj|k_proj|v_proj|qkv_proj|query|key|value|query_key_value|c_attn|Wqkv|qkv|in_proj|[qkv]_lin)(\.\d+)?$"
)
_TAKES_ATTENTION_OUTPUT = re.compile(
    r"(attn|attention)[^.]*\.(.*\.)?(out_proj|o_proj|c_proj|dense|Wo|out_lin)(\.\d+)?$"
)


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer inside a transformer layer."""

    layer: int
    name: str  # within its layer
    path: str  # within the model
    takes: str  # one of the four inputs above
    module: nn.Linear


def projections(model: Any) -> list[Projection]:
    """Every linear layer of the transformer layers, in the model's order.

    The transformer layers are the `nn.ModuleList` with the most parameters. A linear layer whose input is not as wide
    as the hidden states is the contraction of the feed-forward.

    Raises ValueError where there are no such layers.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = []
    if lists:
        prefix, layers = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
        found = [
            Projection(index, name, f"{prefix}.{index}.{name}", _takes(name, module, model.config.hidden_size), module)
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
