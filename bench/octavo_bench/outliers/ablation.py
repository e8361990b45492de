"""What outlier features carry: a model without them.

Features are set to zero in front of query, key and value of every layer, as the paper does (section 4). The residual
stream and the feed-forward see them as before.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..accuracy.scores import LOSS, TOP, Judge
from ..models.language import Language
from ..models.modules import ATTENTION_INPUT, hooked, projections, zeroing
from ..progress import Progress
from ..tables import Cell, Table


@dataclass(frozen=True)
class Ablation:
    """The model with some features of all attention inputs set to zero."""

    features: list[int]
    top: float  # mean of the largest softmax probability: of the next token; in an encoder of attention
    loss: float  # nats per token; in an encoder 1 - cosine of the embeddings with the untouched model's


def ablate(language: Language, judge: Judge, features: Sequence[int], progress: Progress, doing: str) -> Ablation:
    """Measure with `features` set to zero. The first run of a judge must be one that zeroes none."""
    consumers = [each.module for each in projections(language.model) if each.takes == ATTENTION_INPUT]
    if not consumers:
        raise ValueError(f"model: expected query, key and value layers, got none in {type(language.model).__name__}")
    with hooked((module, zeroing(features)) for module in consumers):
        found = judge.score(language.model, progress, doing)
    return Ablation(list(features), found.mean(TOP), found.mean(LOSS))


def table(untouched: Ablation, without: Ablation | None, drawn: Sequence[Ablation], *, causal: bool) -> Table:
    """The model untouched, without its outlier features, and without as many random ones."""

    def row(name: str, own: Sequence[Ablation]) -> list[Cell]:
        loss, top = statistics.fmean(a.loss for a in own), statistics.fmean(a.top for a in own)
        quality = _exp(loss) if causal else loss
        change = 100 * (quality / _exp(untouched.loss) - 1) if causal else None
        return [name, quality, change, top, 100 * (top / untouched.top - 1)]

    rows = [row("nothing", [untouched])]
    if without is not None:
        rows.append(row(f"the {len(without.features)} outlier features", [without]))
    if drawn:
        rows.append(row(f"{len(drawn[0].features)} random features (mean of {len(drawn)} draws)", drawn))
    return Table(
        "What zeroing features in front of query, key and value does",
        {
            "set to zero": "", "perplexity" if causal else "1 - cosine": ".5g", "change, %": "+.1f", "top-1": ".4f",
            "top-1 change, %": "+.1f",
        },
        rows,
        "The feed-forward sees them as before, also those that are outlying there. Random: of those that are outlying "
        "nowhere."
        if without
        else "There are no outlier features to be zeroed.",
    )  # fmt: skip


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
