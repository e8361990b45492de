"""`octavo analyze`, from top to bottom."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from ..machine import Facts
from ..models import modules
from ..models.find import find
from ..models.language import Language, read_windows
from ..pictures import Figures
from ..progress import Progress
from ..tables import Report
from . import Settings, ablation, observe, pictures, worth


def command(args: argparse.Namespace, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """`octavo analyze`."""
    settings = Settings(**{each.name: getattr(args, each.name) for each in fields(Settings)})
    report, figures = run(find(args.model), args.text, settings, facts, progress)
    return report, figures if args.plots else {}


def run(loaded: Language, text: Path, settings: Settings, facts: Facts, progress: Progress) -> tuple[Report, Figures]:
    """Measure everything. Raises ValueError and OSError for a model or text that cannot be used."""
    windows = read_windows(loaded, text, settings.window, limit=settings.limit)
    progress.begin(len(windows) * (6 + (settings.draws if settings.ablate else 0)))

    # 1. Which features are outliers, where, and what their values are like.
    seen = observe.observe(loaded, windows, settings.threshold, progress)
    features = seen.features(settings.min_layers, settings.min_positions)
    numbers = [feature.number for feature in features]

    # 2. What they carry.
    zero = ablation.Zeroing(loaded, windows, progress)
    untouched = zero.run("as it is", [])
    without = zero.run("without the outlier features", numbers) if numbers else None
    drawn = []
    excluded = seen.ever_outlying()  # more than the outlier features: those in a few layers, too
    others = min(len(numbers), seen.width - len(excluded))  # as many, where there are as many
    if settings.ablate and others:
        for chosen in modules.random_features(others, seen.width, excluded, settings.draws):
            drawn.append(zero.run("without random features", chosen))

    # 3. What their 16-bit weights are worth.
    tables = [
        observe.model_table(seen, features, settings, untouched.top, without.top if without else None),
        observe.feature_table(features),
        observe.projection_table(seen),
        worth.table(loaded, windows, progress),
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
    return report, pictures.figures(seen, features, settings)
