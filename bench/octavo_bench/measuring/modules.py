"""Reading and changing the linear layers of a model that somebody else wrote."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from octavo.torch import Int8Linear
from torch import Tensor, nn

SEED = 0  # of the features that are drawn


def copy_modules(model: nn.Module) -> nn.Module:
    """A copy whose modules can be replaced without touching `model`. The tensors are shared: never write to them."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def output_head(model: nn.Module) -> str | None:
    """The qualified name of the layer that makes logits of hidden states; None where the model has none.

    It stays in float32, as in the paper.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Int8Linear]]:
    """Each linear layer but the output head, and its qualified name, converted or not."""
    head = output_head(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Int8Linear) and name != head:
            yield name, module


def linear_bytes(model: nn.Module) -> int:
    """Bytes that the linear layers hold: weights, scales, kept outlier weights, biases."""
    total = 0
    for _, module in linear_layers(model):
        weight = module.int8_weight if isinstance(module, Int8Linear) else module.weight
        total += weight.nbytes + (0 if module.bias is None else module.bias.nbytes)
    return total


@contextmanager
def hooked(modules: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """While it lasts, each module calls its hook before it runs."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zeroing(features: Sequence[int]) -> Callable[..., Any]:
    """A hook that sets these features of a module's input to zero. Nothing else of the model sees that."""
    columns = torch.tensor(features, dtype=torch.int64)
    return lambda module, args: (args[0].index_fill(-1, columns, 0.0), *args[1:])


def random_features(count: int, width: int, excluded: Sequence[int], draws: int, seed: int = SEED) -> list[list[int]]:
    """`draws` choices of `count` features of `width`, none excluded; the same for the same seed."""
    generator = random.Random(seed)
    others = sorted(set(range(width)) - set(excluded))
    return [sorted(generator.sample(others, count)) for _ in range(draws)]


def top_probability(probabilities: Tensor, real: Tensor) -> Tensor:
    """Attention [b, heads, query, key], real bool [b, query] -> the sum of the real queries' top probability.

    It is the largest over the keys, and its mean is taken over the heads. A scalar.
    """
    return probabilities.amax(-1).mean(1)[real].sum()
