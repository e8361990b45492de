"""`octavo analyze`, from top to bottom: the outlier features of a model, and what they carry.

What they carry is what a model without them lacks: they are set to zero in front of query, key and value of every
layer, as the paper does (section 4). The residual stream and the feed-forward see them as before.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..accuracy.scores import LOSS, TOP, Judge
from ..machine import Facts
from ..models import modules
from ..models.find import find
from ..models.language import Language, read_windows
from ..models.modules import ATTENTION_INPUT, hooked, projections, zeroing
from ..pictures import BLUE, GRAY, GREEN, ORANGE, VERMILION, Figures, quiet
from ..progress import Progress
from ..tables import Cell, Report, Table
from . import observe
from .observe import Feature, Observation, Settings

_STYLES = [(color, marker) for marker in "oDs^" for color in (VERMILION, BLUE, GREEN, ORANGE)]


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """`octavo analyze`."""
    settings = Settings(**{each.name: getattr(args, each.name) for each in fields(Settings)})
    loaded = find(args.model, trust_remote_code=args.trust_remote_code)
    report, figures = run(loaded, args.text, settings, facts, progress)
    return report, figures if args.plots else {}


def run(loaded: Language, text: Path, settings: Settings, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """Measure everything. Raises ValueError and OSError for a model or text that cannot be used."""
    windows = read_windows(loaded, text, settings.window, limit=settings.limit)
    progress.begin(len(windows) * (3 + (settings.draws if settings.ablate else 0)))

    # 1. Which features are outliers, where, and what their values are like.
    seen = observe.observe(loaded, windows, settings.threshold, progress)
    features = seen.features(settings.min_layers, settings.min_positions)
    numbers = [feature.number for feature in features]

    # 2. What they carry.
    without_features = partial(ablate, loaded, Judge(loaded, windows), progress=progress)
    untouched = without_features([], doing="as it is")
    without = without_features(numbers, doing="without the outlier features") if numbers else None
    drawn = []
    excluded = seen.ever_outlying()  # more than the outlier features: those in a few layers, too
    others = min(len(numbers), seen.width - len(excluded))  # as many, where there are as many
    if settings.ablate and others:
        for chosen in modules.random_features(others, seen.width, excluded, settings.draws):
            drawn.append(without_features(chosen, doing="without random features"))

    tables = [observe.model_table(seen, features, settings, untouched.top, without.top if without else None)]
    tables += [observe.feature_table(features), observe.projection_table(seen)]
    if settings.ablate:
        tables.append(ablation_table(untouched, without, drawn, causal=loaded.causal))
    about = {"model": str(loaded.path), "parameters": loaded.model.num_parameters(), "text": str(text)}
    about |= {"windows": len(windows), "positions": seen.positions, "threshold": settings.threshold}
    report = Report(f"octavo analyze: {loaded.path.name}", facts.now(**about, seed=modules.SEED), tables)
    return report, {"outliers.png": partial(draw, seen, features, settings)}


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


def ablation_table(untouched: Ablation, without: Ablation | None, drawn: Sequence[Ablation], *, causal: bool) -> Table:
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
    quality = "perplexity" if causal else "1 - cosine"
    columns = {"set to zero": "", quality: ".5g", "change, %": "+.1f", "top-1": ".4f", "top-1 change, %": "+.1f"}
    note = "There are no outlier features to be zeroed."
    if without:
        note = "The feed-forward sees them as before, also those that are outlying there. Random: of those that are "
        note += "outlying nowhere."
    return Table("What zeroing features in front of query, key and value does", columns, rows, note)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def draw(seen: Observation, features: Sequence[Feature], settings: Settings) -> Figure:
    """The largest magnitude of every feature; at what share of positions the outlier features are outlying."""
    figure: Figure = plt.figure(figsize=(13, 4.6))
    left, right = figure.subplots(1, 2)
    share = 100 * seen.shares().numpy()  # [layers, width]
    layers = range(len(share))
    for magnitudes in seen.magnitudes.numpy():
        left.plot(magnitudes, ".", color=GRAY, markersize=3)
    for place, (feature, (color, marker)) in enumerate(zip(features, _STYLES, strict=False)):
        name = f"feature {feature.number}"
        of_feature = seen.magnitudes[:, feature.number].numpy()
        left.plot([feature.number] * len(share), of_feature, marker, color=color, markersize=5, label=name)
        size = max(4.0, 12.0 - 2.0 * place)  # lines that lie on each other stay to be seen
        right.plot(layers, share[:, feature.number], marker + "-", color=color, label=name, markersize=size)
    left.axhline(settings.threshold, color="black", linewidth=1, linestyle="--", label="threshold")
    left.set_ylim(bottom=0)
    left.set_xlabel("feature of the hidden states (a dot for each layer)")
    left.set_ylabel("largest magnitude at any position")
    right.bar(layers, (share > 0).mean(1) * 100, color=GRAY, alpha=0.4, label="features that ever are, %")
    right.set_ylim(-2, 104)
    right.set_xlabel("layer")
    right.set_ylabel(f"positions with magnitude >= {settings.threshold:g}, %")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (left, right):
        axis.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        quiet(axis, "y")
    figure.suptitle("Outlier features" if features else "No feature is outlying systematically")
    figure.tight_layout()
    return figure
