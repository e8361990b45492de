"""Why decomposition is needed: the model's own outlier features, and what they carry.

An outlier column is an input feature of a linear layer that reaches magnitude 6 at some token. MiniLM has a
few, the same ones layer after layer. To see what they carry, the two largest of the attention input are set
to zero in front of query, key and value of every layer, and, for comparison, as many random other features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo_bench.measuring import systematic
from octavo_bench.measuring.modules import hooked, top_probability, zeroing
from octavo_bench.measuring.systematic import Features

from .model import Batch, layers, pool
from .schemes import Quality, quality

# The four different inputs of a layer's six linear layers, and one linear layer that takes each.
ATTENTION_INPUT, FEED_FORWARD_INPUT = "attention input", "feed-forward input"
INPUTS = {
    ATTENTION_INPUT: "attention.self.query",
    "attention context": "attention.output.dense",
    FEED_FORWARD_INPUT: "intermediate.dense",
    "feed-forward hidden": "output.dense",
}
ATTENTION_CONSUMERS = ("attention.self.query", "attention.self.key", "attention.self.value")


Observed = dict[tuple[int, str], Features]  # by layer and the input's name


@dataclass(frozen=True)
class Ablation:
    """The model with some features of the attention input set to zero."""

    features: list[int]
    quality: Quality  # of the embeddings, against the untouched model's
    top_probability: float  # attention: the largest softmax probability, mean over layers, heads and tokens
    top_probability_by_layer: list[float]


def linear_at(layer: nn.Module, path: str) -> nn.Module:
    """The linear layer at a path of a transformer layer, also where a rescaling stands in front of it."""
    module = layer.get_submodule(path)
    return module[-1] if isinstance(module, nn.Sequential) else module


def linear_inputs(model: nn.Module) -> dict[tuple[int, str], nn.Module]:
    """By layer and the input's name, a linear layer that takes it."""
    return {
        (index, name): linear_at(layer, path)
        for index, layer in enumerate(layers(model))
        for name, path in INPUTS.items()
    }


def observe(model: nn.Module, batches: Sequence[Batch]) -> Observed:
    """What the features of every linear input of a float model are like on these batches."""
    return systematic.observe(model, [batch.inputs for batch in batches], linear_inputs(model))


def largest_features(observed: Observed, count: int) -> list[int]:
    """The features of the attention input with the largest magnitude in any layer, the largest first."""
    return systematic.largest_features((own for (_, name), own in observed.items() if name == ATTENTION_INPUT), count)


def ever_outlying(observed: Observed) -> list[int]:
    """The hidden state's features that are outlier columns in front of any layer's attention or feed-forward."""
    inputs = (ATTENTION_INPUT, FEED_FORWARD_INPUT)
    return sorted({column for (_, name), own in observed.items() if name in inputs for column in own.outliers})


def ablate(model: nn.Module, batches: Sequence[Batch], features: Sequence[int], reference: Tensor) -> Ablation:
    """Zeroes features of all layers' attention input; `reference`: the untouched embeddings [count, 384]."""
    consumers = [linear_at(layer, path) for layer in layers(model) for path in ATTENTION_CONSUMERS]
    embeddings = torch.empty_like(reference)
    sums, tokens = torch.zeros(len(layers(model)), dtype=torch.float64), 0
    with hooked((module, zeroing(features)) for module in consumers), torch.inference_mode():
        for batch in batches:
            output = model(**batch.inputs, output_attentions=True)
            embeddings[batch.indices] = pool(output.last_hidden_state, batch.real)
            tokens += int(batch.real.sum())
            # attentions: per layer [b, heads, query, key]
            sums += torch.stack([top_probability(p, batch.real) for p in output.attentions]).double()
    by_layer = sums / tokens
    return Ablation(list(features), quality(embeddings, reference), float(by_layer.mean()), by_layer.tolist())
