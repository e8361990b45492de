"""What outlier features carry: a model without them.

Features are set to zero in front of query, key and value of every layer, as the paper does (section 4). The residual
stream and the feed-forward see them as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo_bench.measuring.language import Language, Window, log_likelihoods
from octavo_bench.measuring.modules import hooked, top_probability, zeroing
from octavo_bench.measuring.progress import Progress

from .blocks import ATTENTION_INPUT, projections


@dataclass(frozen=True)
class Ablation:
    """The model with some features of all attention inputs set to zero."""

    features: list[int]
    # The largest softmax probability. Causal models: of the next token, mean over positions; encoders: of attention,
    # mean over layers, heads and positions.
    top_probability: float
    perplexity: float | None  # causal models
    mean_cosine: float | None  # encoders: of the last hidden states with the untouched model's, mean over positions


class Zeroing:
    """Runs a model on windows with features set to zero. The first run must be the one that zeroes nothing."""

    def __init__(self, language: Language, windows: Sequence[Window], progress: Progress) -> None:
        self._language, self._windows, self._progress = language, windows, progress
        self._consumers = [p.module for p in projections(language.model) if p.takes == ATTENTION_INPUT]
        self._untouched: list[Tensor] = []  # an encoder's last hidden states, [w, width] for each window
        if not self._consumers:
            raise ValueError(
                f"model: expected query, key and value layers, got none in {type(language.model).__name__}"
            )

    def run(self, doing: str, features: Sequence[int]) -> Ablation:
        """Measure with `features` set to zero."""
        with hooked((module, zeroing(features)) for module in self._consumers), torch.inference_mode():
            return self._causal(doing, features) if self._language.causal else self._encoder(doing, features)

    def _causal(self, doing: str, features: Sequence[int]) -> Ablation:
        total, top, count = 0.0, 0.0, 0
        for window in self._windows:
            with self._progress.step(doing):
                own, largest = log_likelihoods(self._language.model, window)
                total, top, count = total + float(own.sum()), top + float(largest.sum()), count + window.scored
        return Ablation(list(features), top / count, _exp(-total / count), None)

    def _encoder(self, doing: str, features: Sequence[int]) -> Ablation:
        first = not self._untouched
        cosine, top, count = 0.0, 0.0, 0
        for index, window in enumerate(self._windows):
            with self._progress.step(doing):
                output = self._language.model(**window.inputs, output_attentions=True)
                hidden = output.last_hidden_state[0]
                if first:
                    self._untouched.append(hidden)
                real = torch.ones_like(window.ids, dtype=torch.bool)  # windows are not padded
                by_layer = [top_probability(probabilities, real) for probabilities in output.attentions]
                top += float(torch.stack(by_layer).double().mean())
                both = hidden.double(), self._untouched[index].double()
                cosine += float(nn.functional.cosine_similarity(*both, dim=-1).sum())
                count += window.ids.shape[1]
        return Ablation(list(features), top / count, None, cosine / count)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
