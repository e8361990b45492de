"""`octavo eval`: what the schemes of the paper's Table 1 cost a model, and SmoothQuant and peers beside them.

A causal language model's perplexity on a text, and its accuracy on a task file; an encoder's embeddings. And what the
16-bit outlier weights are worth: dequantized against kept, chosen by call, by row or once. Each scheme sees the same
windows, one in each call, so that the columns that are outlying in one have no part in another; the difference from
float32 is paired window by window.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
    """How much to measure."""

    schemes: Sequence[str] | None = None  # keys; None: all
    window: int | None = None
    stride: int | None = None
    limit: int | None = None
    # Text for kept columns and SmoothQuant; None: the first windows, which are then not scored.
    calibration: Path | None = None
    calibration_windows: int = 8
    task: Path | None = None
    questions: int | None = None
    peers: bool = False
    seconds: float = 5.0  # of timing the peers


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
        help="text that outlier columns to be kept in 16 bit, and SmoothQuant's scales, are found with; default: the "
        "first windows of --text, which are then left out of the evaluation",
    )
    parser.add_argument(
        "--calibration-windows", type=positive, default=8, metavar="N", help="how many; default: %(default)s"
    )
    parser.add_argument(
        "--task",
        type=Path,
        metavar="FILE",
        help="zero-shot accuracy, too, on questions of one JSON object in each line: "
        '{"prompt": "...", "choices": [" ...", " ..."], "answer": 0}',
    )
    parser.add_argument("--questions", type=positive, metavar="N", help="only the first N of the task; default: all")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="bitsandbytes and torchao in the same table where they are installed, and how long each takes",
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="X", help="of timing the peers; default: %(default)g"
    )


def main(args: argparse.Namespace) -> int:
    """`octavo eval`: runs, prints the table, writes JSON and PNGs. Returns the exit status."""
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
    settings = Settings(
        args.schemes,
        args.window,
        args.stride,
        args.limit,
        args.calibration,
        args.calibration_windows,
        args.task,
        args.questions,
        args.peers,
        args.seconds,
    )
    report = run(
        args.model, args.text, settings, threads=threads, show_progress=not args.quiet, command=args.command_line
    )
    drawn = plots.figures(report) if args.plots else {}
    put_out(reports.text(report), reports.content(report, drawn), args.json)
    if drawn:
        save_all(drawn, args.plots)
    return 0


def run(
    model: Path,
    text: Path,
    settings: Settings,
    *,
    threads: int = 1,
    show_progress: bool = True,
    command: str = "",
) -> Report:
    """Measure every scheme. Raises ValueError and OSError for a model, text or task that cannot be used."""
    from . import measurement

    return measurement.run(model, text, settings, threads=threads, show_progress=show_progress, command=command)
