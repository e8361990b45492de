"""`octavo analyze`: the outlier features of a model, as the paper's section 4 looks at them.

A feature is an outlier feature where its magnitude is at least 6 in at least 25 % of the layers and at at least 6 % of
the sequence positions. `run` tells the story from top to bottom; each chapter is a module of its own.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo_bench.measuring import options
from octavo_bench.measuring.options import positive

if TYPE_CHECKING:
    from .report import Report

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """What counts as an outlier feature (defaults: the paper's), and how much to measure."""

    threshold: float = 6.0
    min_layers: float = 0.25
    min_positions: float = 0.06
    window: int | None = None
    limit: int | None = None
    ablate: bool = False
    draws: int = 3  # of random features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo analyze`."""
    options.add_model_and_text(parser)
    parser.add_argument("--ablate", action="store_true", help="zero outlier features, and as many random ones, compare")
    parser.add_argument("--draws", type=positive, default=3, metavar="N", help="of random features; default: 3")
    parser.add_argument("--threshold", type=float, default=6.0, metavar="X", help="magnitude of an outlier; default: 6")
    parser.add_argument("--min-layers", type=float, default=0.25, metavar="F", help="share of layers; default: 0.25")
    parser.add_argument("--min-positions", type=float, default=0.06, metavar="F", help="of positions; default: 0.06")


def main(args: argparse.Namespace) -> int:
    """`octavo analyze`: runs, prints tables, writes JSON and PNGs. Returns the exit status."""
    settings = Settings(
        args.threshold, args.min_layers, args.min_positions, args.window, args.limit, args.ablate, args.draws
    )
    _check(settings)
    options.prepare(args)
    from octavo_bench.measuring import machine
    from octavo_bench.measuring.output import put_out

    from . import report as reports

    if args.plots:
        # Now, not after minutes of work: what cannot be imported must not cost the measurement.
        from octavo_bench.measuring.drawing import save_all

        from . import plots

    threads = args.threads or machine.available_cores()
    machine.set_threads(threads)
    report = run(
        args.model, args.text, settings, threads=threads, show_progress=not args.quiet, command=args.command_line
    )
    drawn = plots.figures(report) if args.plots else {}
    put_out(reports.text(report), reports.content(report, drawn), args.json)
    if drawn:
        save_all(drawn, args.plots)
    return 0


def run(
    model: Path, text: Path, settings: Settings, *, threads: int = 1, show_progress: bool = True, command: str = ""
) -> Report:
    """Measure everything. Raises ValueError and OSError for a model or text that cannot be used."""
    from octavo_bench.measuring import language, machine, modules
    from octavo_bench.measuring.progress import Progress

    from . import ablation, observe, worth
    from . import report as reports

    start = time.perf_counter()
    loaded = language.load(model)
    windows = language.read_windows(loaded, text, settings.window, limit=settings.limit)
    passes = 5 + (settings.draws if settings.ablate else 0)
    with Progress(passes * len(windows), show=show_progress) as progress:
        # 1. Which features are outliers, and where.
        observation = observe.observe(loaded, windows, settings.threshold, progress)
        features = observe.outlier_features(observation, settings.min_layers, settings.min_positions)
        numbers = [feature.number for feature in features]
        spread = observe.spread(loaded, windows, numbers, settings.threshold, progress)

        # 2. What they carry.
        zero = ablation.Zeroing(loaded, windows, progress)
        untouched = zero.run("as it is", [])
        without = zero.run("without the outlier features", numbers) if numbers else None
        drawn = []
        excluded = observe.ever_outlying(observation)  # more than the outlier features: those in a few layers, too
        others = min(len(numbers), observation.width - len(excluded))  # as many, where there are as many
        if settings.ablate and others:
            for chosen in modules.random_features(others, observation.width, excluded, settings.draws):
                drawn.append(zero.run("without random features", chosen))

        # 3. What their 16-bit weights are worth.
        worths = worth.measure(loaded, windows, settings.threshold, progress)

    return reports.Report(
        command=command,
        machine=machine.facts(threads),
        settings={
            "model": str(model),
            "architecture": type(loaded.model).__name__,
            "parameters": loaded.model.num_parameters(),
            "text": str(text),
            "windows": len(windows),
            "positions": observation.positions,
            "threshold": settings.threshold,
            "min_layers": settings.min_layers,
            "min_positions": settings.min_positions,
        },
        causal=loaded.causal,
        features=features,
        spread=spread,
        by_layer=observation.share.tolist(),
        magnitudes=observation.largest.tolist(),
        projections=observation.projections,
        ablate=settings.ablate,
        untouched=untouched,
        without=without,
        random=drawn,
        worths=worths,
        seconds=time.perf_counter() - start,
    )


def _check(settings: Settings) -> None:
    if not settings.threshold >= 0:
        raise ValueError(f"--threshold: expected a number >= 0, got {settings.threshold}")
    for name in ("min_layers", "min_positions"):
        if not 0 <= getattr(settings, name) <= 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: expected a number in [0, 1], got {getattr(settings, name)}")
