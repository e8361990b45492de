"""`octavo eval`: perplexity of a causal language model by every scheme of the paper's Table 1.

And what the 16-bit outlier weights are worth: dequantized against kept, chosen by call, by row or once. Each scheme
sees the same windows, one in each call, so that the columns that are outlying in one have no part in another; the
difference from float32 is paired window by window.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo._sizes import positive
from octavo.measuring import options

if TYPE_CHECKING:
    from .report import Report

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    schemes: Sequence[str] | None = None  # keys; None: all
    window: int | None = None
    stride: int | None = None
    limit: int | None = None
    calibration: Path | None = None  # text for the kept columns; None: the first windows, which are then not scored
    calibration_windows: int = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo eval`."""
    options.add_model_and_text(parser)
    parser.add_argument(
        "--schemes", nargs="+", metavar="NAME", help="default: all; a name that there is not gets them listed"
    )
    parser.add_argument("--stride", type=positive, metavar="N", help="tokens between windows; default: the window's")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text that outlier columns to be kept in 16 bit are found with; default: the first windows of --text, "
        "which are then left out of the evaluation",
    )
    parser.add_argument(
        "--calibration-windows", type=positive, default=8, metavar="N", help="how many; default: %(default)s"
    )


def main(args: argparse.Namespace) -> int:
    """`octavo eval`: runs, prints the table, writes JSON and PNGs. Returns the exit status."""
    options.prepare(args)
    from octavo.measuring import machine
    from octavo.measuring.output import put_out

    from . import report as reports

    threads = args.threads or machine.available_cores()
    machine.set_threads(threads)
    settings = Settings(args.schemes, args.window, args.stride, args.limit, args.calibration, args.calibration_windows)
    report = run(args.model, args.text, settings, threads=threads, show_progress=not args.quiet)
    put_out(reports.text(report), reports.content(report), args.json)
    if args.plots:
        from .plots import write_all

        write_all(report, args.plots)
    return 0


def run(model: Path, text: Path, settings: Settings, *, threads: int = 1, show_progress: bool = True) -> Report:
    """Measure every scheme. Raises ValueError and OSError for a model or text that cannot be used."""
    from octavo.measuring import language, machine, schemes
    from octavo.measuring.modules import linear_bytes
    from octavo.measuring.progress import Progress

    from . import perplexity
    from . import report as reports

    start = time.perf_counter()
    chosen = perplexity.chosen(settings.schemes)
    loaded = language.load(model)
    if not loaded.causal:
        found = loaded.model.config.architectures
        raise ValueError(f"{model}: expected a causal language model in config.json's architectures, got {found}")
    windows = language.read_windows(loaded, text, settings.window, settings.stride)
    calibration: list[language.Window] = []
    if any(scheme.kept for scheme in chosen):
        count = settings.calibration_windows
        if settings.calibration is not None:
            calibration = language.read_windows(loaded, settings.calibration, settings.window, limit=count)
        else:
            calibration, windows = perplexity.set_aside(windows, count)
            if not windows:
                raise ValueError(
                    f"{text}: expected more than the {count} windows of the calibration, got {len(calibration)} "
                    "(give --calibration FILE, or fewer --calibration-windows)"
                )
    windows = windows[: settings.limit]

    results = []
    units = len(windows) * len({schemes.FLOAT32, *chosen}) + len(calibration)
    with Progress(units, show=show_progress) as progress:
        with progress.step("calibrating", len(calibration)):
            ready = schemes.calibrated(loaded.model, [w.inputs for w in calibration]) if calibration else loaded.model
        reference = perplexity.score(loaded.model, windows, progress, schemes.FLOAT32.name)
        for scheme in chosen:
            converted = schemes.convert(ready if scheme.kept else loaded.model, scheme)
            known = scheme == schemes.FLOAT32
            found = reference if known else perplexity.score(converted, windows, progress, scheme.name)
            results.append(perplexity.compare(scheme, found, reference, linear_bytes(converted)))
    return reports.Report(
        machine=machine.facts(threads),
        settings={
            "model": str(model),
            "architecture": type(loaded.model).__name__,
            "parameters": loaded.model.num_parameters(),
            "text": str(text),
            "calibration": str(settings.calibration or text),
            "calibration_windows": len(calibration),
            "window": max(window.ids.shape[1] for window in windows),
            "stride": settings.stride,
            "threshold": schemes.THRESHOLD,
        },
        windows=len(windows),
        tokens=sum(window.scored for window in windows),
        results=results,
        seconds=time.perf_counter() - start,
    )
