"""The report as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from octavo_bench.measuring.drawing import BLUE, GRAY, VERMILION, draw_tables, quiet

from .perplexity import Result
from .report import Report, tables


def figures(report: Report) -> dict[str, Callable[[], Figure]]:
    """What draws each picture, by the name of its file."""
    found: dict[str, Callable[[], Figure]] = {}
    if report.causal:
        found["perplexity.png"] = partial(draw_perplexity, report)
    else:
        found["embeddings.png"] = partial(draw_embeddings, report)
    if report.accuracies:
        found["accuracy.png"] = partial(draw_accuracy, report)
    if report.times:
        found["peers.png"] = partial(draw_peers, report)
    return {**found, "table.png": partial(draw_tables, tables(report))}


def draw_perplexity(report: Report) -> Figure:
    """What each scheme costs in log-likelihood per token, with twice the standard error."""
    names = [f"{result.name}  ({_perplexity(result.perplexity)})" for result in report.results]
    losses = [-result.difference for result in report.results]
    errors = [result.standard_error for result in report.results]
    return _losses(
        names,
        losses,
        errors,
        "log-likelihood lost per token, nats\n(bars: twice the standard error; gray: within them)",
        "Against float32 (in brackets: perplexity)",
    )


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"


def draw_embeddings(report: Report) -> Figure:
    """How far each scheme's embeddings are from float32's."""
    names = [f"{found.name}  (lowest cosine {found.min_cosine:.4f})" for found in report.similarities]
    losses = [1 - found.mean_cosine for found in report.similarities]
    errors = [found.standard_error for found in report.similarities]
    return _losses(names, losses, errors, "1 - mean cosine (bars: twice the standard error)", "Against float32")


def draw_accuracy(report: Report) -> Figure:
    """Questions answered rightly, with twice the standard error of the difference from float32."""
    names = [f"{found.name}  ({100 * found.accuracy:.1f} %)" for found in report.accuracies]
    losses = [-100 * found.difference for found in report.accuracies]
    errors = [100 * found.difference_error for found in report.accuracies]
    return _losses(
        names,
        losses,
        errors,
        "accuracy lost, percentage points\n(bars: twice the standard error; gray: within them)",
        "Zero-shot accuracy against float32 (in brackets: accuracy)",
        scale="linear",
    )


def _losses(
    names: Sequence[str],
    losses: Sequence[float],
    errors: Sequence[float],
    label: str,
    title: str,
    scale: str = "symlog",
) -> Figure:
    """A row for each, its loss and twice the standard error."""
    figure: Figure = plt.figure(figsize=(9, 1.6 + 0.36 * len(names)))
    axis = figure.subplots()
    for place, (loss, error) in enumerate(zip(losses, errors, strict=True)):
        if not math.isfinite(loss):
            axis.annotate("not finite", (0, place), color=VERMILION, va="center")
            continue
        bar = 0.0 if math.isnan(error) else 2 * error
        # Told apart by sign where it can be.
        color, marker = (GRAY, "o") if abs(loss) <= bar else (VERMILION, "D") if loss > 0 else (BLUE, "s")
        axis.errorbar(loss, place, xerr=bar, fmt=marker, color=color, capsize=3, markersize=6)
    axis.axvline(0, color="black", linewidth=1)
    if scale == "symlog":
        # Linear where differences drown in their errors, logarithmic where they do not.
        # A power of ten, so that no tick stands in the linear part.
        known = max(min((2 * error for error in errors if error > 1e-9), default=1e-3), 1e-6)
        axis.set_xscale("symlog", linthresh=10.0 ** math.ceil(math.log10(known)))
    axis.margins(x=0.08)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.set_title(title)
    quiet(axis, "both")
    figure.tight_layout()
    return figure


def draw_peers(report: Report) -> Figure:
    """Time, memory and loss of octavo's layers and its peers'."""
    figure: Figure = plt.figure(figsize=(12, 1.5 + 0.5 * len(report.times)))
    left, middle, right = figure.subplots(1, 3, sharey=True)
    rows = {row.key: row for row in report.rows}
    for place, timed in enumerate(report.times):
        color = BLUE if place == 0 else GRAY
        time = timed.milliseconds
        spread = [[time.median - time.lower], [time.upper - time.median]]
        left.barh(place, time.median, xerr=spread, color=color, capsize=3)
        _label(left, place, time.upper, f"{time.median:.1f}")
        row = rows.get(timed.key)
        if row is not None:
            size = row.linear_bytes / (1 << 20)
            middle.barh(place, size, color=color)
            _label(middle, place, size, f"{size:.2f}")
            loss = -row.difference if isinstance(row, Result) else 1 - row.mean_cosine
            bar = 0.0 if math.isnan(row.standard_error) else 2 * row.standard_error
            right.errorbar(loss, place, xerr=bar, fmt="o", color=color, capsize=3)
    left.set_yticks(range(len(report.times)), [timed.name for timed in report.times])
    left.invert_yaxis()
    left.set_xlabel(f"ms for {report.timed_tokens} tokens (bars: quartiles)")
    middle.set_xlabel("MiB of the linear layers")
    right.set_xlabel("nats lost per token" if report.causal else "1 - mean cosine")
    right.axvline(0, color="black", linewidth=1)
    right.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3), useMathText=True)
    right.locator_params(axis="x", nbins=5)
    for axis in (left, middle, right):
        axis.margins(x=0.15)
        quiet(axis, "x")
    figure.tight_layout()
    return figure


def _label(axis: Axes, place: int, value: float, text: str) -> None:
    axis.annotate(text, (value, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
