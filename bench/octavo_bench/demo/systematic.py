"""Systematic outliers of the size that large models have, in a model that computes the same function.

From 6.7B parameters on, a few features are large at nearly every token: around -40 in a 6.7B and around -58
in a 13B model (the paper's Table 4). MiniLM's are smaller. Here each chosen feature x of the input of query,
key, value and of the feed-forward is replaced by z = x*d + s, which has the wanted mean and deviation, and
the layers that take it get W' = W/d and bias' = bias - W' s. So W' z + bias' = W x + bias: the float32 model
computes what it did, but its linear layers now see outliers. (MiniLM normalizes after each block, and the
residual path takes the normalized value too, so changing the LayerNorm instead would change the function.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo_bench.measuring.modules import copy_modules
from octavo_bench.measuring.systematic import Size, folded, rescaling_to, watch

from .model import Batch, layers
from .outliers import (
    ATTENTION_CONSUMERS,
    ATTENTION_INPUT,
    FEED_FORWARD_INPUT,
    Observed,
    linear_at,
    linear_inputs,
)

CONSUMERS = {ATTENTION_INPUT: ATTENTION_CONSUMERS, FEED_FORWARD_INPUT: ("intermediate.dense",)}
SIZES = (Size(40.0, 6.0), Size(58.0, 13.0))


@dataclass(frozen=True)
class Measured:
    """What the chosen features are like in a model, over layers, inputs and tokens."""

    quartiles: list[float]  # lower quartile, median, upper quartile
    share_negative: float


def with_outliers(model: nn.Module, features: Sequence[int], size: Size, observed: Observed) -> nn.Module:
    """A copy of the model that computes the same function, with systematic outliers in the given features.

    `observed` says what mean and deviation the features have as they are.
    """
    model = copy_modules(model)
    for index, layer in enumerate(layers(model)):
        for name, paths in CONSUMERS.items():
            seen = observed[index, name]
            rescaling = rescaling_to(size, features, seen.mean, seen.deviation)
            for path in paths:
                parent, _, child = path.rpartition(".")
                linear = linear_at(layer, path)
                assert isinstance(linear, nn.Linear)
                setattr(layer.get_submodule(parent), child, nn.Sequential(rescaling, folded(linear, rescaling)))
    return model


def measure(model: nn.Module, batches: Sequence[Batch], features: Sequence[int]) -> Measured:
    """What the features are like where the rescaled linear layers take them."""
    seen: list[Tensor] = []

    watched = {(index, name): module for (index, name), module in linear_inputs(model).items() if name in CONSUMERS}
    inputs = [batch.inputs for batch in batches]
    watch(model, inputs, watched, lambda key, x: seen.append(x[:, list(features)].flatten()))
    values = torch.cat(seen)
    quartiles = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return Measured(quartiles.tolist(), float((values < 0).double().mean()))
