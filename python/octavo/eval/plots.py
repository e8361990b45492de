"""The report as pictures."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from octavo.measuring.drawing import BLUE, GRAY, VERMILION, draw_tables, quiet, save_all

from .report import Report, table


def write_all(report: Report, directory: Path) -> list[Path]:
    """Draws every picture into `directory`; returns their paths."""
    figures = {"perplexity.png": partial(draw_perplexity, report), "table.png": partial(draw_tables, [table(report)])}
    return save_all(figures, directory)


def draw_perplexity(report: Report) -> Figure:
    """What each scheme costs in log-likelihood per token, with twice the standard error."""
    figure: Figure = plt.figure(figsize=(9, 1.6 + 0.36 * len(report.results)))
    axis = figure.subplots()
    losses = [-result.difference for result in report.results]
    errors = [2 * result.standard_error for result in report.results if result.standard_error > 0]
    for place, (result, loss) in enumerate(zip(report.results, losses, strict=True)):
        if not math.isfinite(loss):
            axis.annotate("not finite", (0, place), color=VERMILION, va="center")
            continue
        error = 0.0 if math.isnan(result.standard_error) else 2 * result.standard_error
        # Told apart by sign where it can be.
        color, marker = (GRAY, "o") if abs(loss) <= error else (VERMILION, "D") if loss > 0 else (BLUE, "s")
        axis.errorbar(loss, place, xerr=error, fmt=marker, color=color, capsize=3, markersize=6)
    axis.axvline(0, color="black", linewidth=1)
    # Linear where differences drown in their errors, logarithmic where they do not.
    axis.set_xscale("symlog", linthresh=max(min(errors, default=1e-3), 1e-6))
    axis.margins(x=0.08)
    names = [f"{result.name}  ({result.perplexity:.5g})" for result in report.results]
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("log-likelihood lost per token, nats (bars: twice the standard error; gray: within them)")
    axis.set_title("Against float32 (in brackets: perplexity)")
    quiet(axis, "both")
    figure.tight_layout()
    return figure
