"""`octavo analyze`, from top to bottom."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..accuracy.scores import Judge
from ..machine import Facts
from ..models import modules
from ..models.find import find
from ..models.language import Language, read_windows
from ..pictures import BLUE, GRAY, GREEN, ORANGE, VERMILION, Figures, quiet
from ..progress import Progress
from ..tables import Report
from . import ablation, observe
from .observe import Feature, Observation, Settings

_STYLES = [(color, marker) for marker in "oDs^" for color in (VERMILION, BLUE, GREEN, ORANGE)]


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """`octavo analyze`."""
    settings = Settings(**{each.name: getattr(args, each.name) for each in fields(Settings)})
    report, figures = run(
        find(args.model, trust_remote_code=args.trust_remote_code), args.text, settings, facts, progress
    )
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
    ablate = partial(ablation.ablate, loaded, Judge(loaded, windows), progress=progress)
    untouched = ablate([], doing="as it is")
    without = ablate(numbers, doing="without the outlier features") if numbers else None
    drawn = []
    excluded = seen.ever_outlying()  # more than the outlier features: those in a few layers, too
    others = min(len(numbers), seen.width - len(excluded))  # as many, where there are as many
    if settings.ablate and others:
        for chosen in modules.random_features(others, seen.width, excluded, settings.draws):
            drawn.append(ablate(chosen, doing="without random features"))

    tables = [
        observe.model_table(seen, features, settings, untouched.top, without.top if without else None),
        observe.feature_table(features),
        observe.projection_table(seen),
    ]
    if settings.ablate:
        tables.append(ablation.table(untouched, without, drawn, causal=loaded.causal))
    report = Report(
        f"octavo analyze: {loaded.path.name}",
        facts.now(
            model=str(loaded.path), parameters=loaded.model.num_parameters(), text=str(text), windows=len(windows),
            positions=seen.positions, threshold=settings.threshold, seed=modules.SEED,
        ),
        tables,
    )  # fmt: skip
    return report, {"outliers.png": partial(draw, seen, features, settings)}


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
