"""The report as pictures: one PNG per part of the story, and the tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from octavo_bench.measuring.drawing import BLUE, GRAY, ORANGE, VERMILION, draw_tables, quiet, save_all

from .outliers import INPUTS
from .report import Report, tables


def write_all(report: Report, directory: Path) -> list[Path]:
    """Draws every picture into `directory`; returns their paths."""
    figures: dict[str, Callable[[Report], Figure]] = {
        "tables.png": lambda report: draw_tables(tables(report)),
        "quality.png": draw_quality,
        "outliers.png": draw_outliers,
        "ablation.png": draw_ablation,
        "timing.png": draw_timing,
    }
    return save_all({name: partial(draw, report) for name, draw in figures.items()}, directory)


def draw_quality(report: Report) -> Figure:
    """How far each scheme's embeddings are from float32's, as the model is and with systematic outliers."""
    panels = [("as it is", report.natural)]
    panels += [(f"systematic outliers of size {s.size.magnitude:g}", s.rows) for s in report.systematic]
    figure: Figure = plt.figure(figsize=(4 + 3.6 * len(panels), 5))
    axes = figure.subplots(1, len(panels), sharey=True, sharex=True)
    for axis, (title, rows) in zip(axes, panels, strict=True):
        shown = [row for row in rows if row.name != "float32"]  # its distance is 0, which no logarithm shows
        places = range(len(shown))
        for value, color, marker, label in (
            ([1 - row.quality.mean_cosine for row in shown], BLUE, "o", "mean over the sentences"),
            ([1 - row.quality.min_cosine for row in shown], VERMILION, "D", "worst sentence"),
        ):
            axis.plot(value, places, marker, color=color, markersize=7, label=label)
        axis.set_xscale("log")
        axis.set_yticks(list(places), [row.name for row in shown])
        axis.set_title(title)
        axis.set_xlabel("1 - cosine with float32 (less is better)")
        quiet(axis, "both")
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, bbox_to_anchor=(0.5, -0.05))
    figure.suptitle("Distance of the embeddings from float32's, by scheme")
    figure.tight_layout()
    return figure


def draw_outliers(report: Report) -> Figure:
    """How many outlier columns each linear input has, and how large the attention input's features are."""
    figure: Figure = plt.figure(figsize=(13, 4.6))
    left, right = figure.subplots(1, 2)
    layers = sorted({found.layer for found in report.outlier_columns})
    styles = zip(INPUTS, (BLUE, GRAY, VERMILION, ORANGE), ("", "..", "//", "xx"), strict=True)
    for place, (name, color, hatch) in enumerate(styles):
        counts = [
            len(f.columns) for layer in layers for f in report.outlier_columns if (f.layer, f.input) == (layer, name)
        ]
        positions = [layer + (place - 1.5) * 0.2 for layer in layers]
        left.bar(positions, counts, 0.2, color=color, hatch=hatch, edgecolor="white", label=name)
    left.set_xticks(layers)
    left.set_xlabel("layer")
    left.set_ylabel("outlier columns")
    left.set_title(f"Columns that reach magnitude {report.settings['threshold']:g}")
    left.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    quiet(left, "y")

    for layer, magnitudes in enumerate(report.feature_magnitudes):
        right.plot(magnitudes, ".", color=GRAY, markersize=3)
        for feature, color, marker in zip(report.largest_features, (VERMILION, BLUE), "Ds", strict=False):
            label = f"feature {feature}" if layer == 0 else None
            right.plot(feature, magnitudes[feature], marker, color=color, markersize=6, label=label)
    right.axhline(report.settings["threshold"], color="black", linewidth=1, linestyle="--", label="threshold")
    right.set_ylim(bottom=0)
    right.set_xlabel("feature of the attention input (a dot for each layer)")
    right.set_ylabel("largest magnitude at any token")
    right.set_title("The attention input's features, all layers")
    right.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    quiet(right, "y")
    figure.tight_layout()
    return figure


def draw_ablation(report: Report) -> Figure:
    """What zeroing the largest outlier features does to embeddings and attention, against random features."""
    ablations = report.ablations
    number = len(ablations.outliers.features)
    zeroed, drawn = f"{number} largest outlier features zeroed", f"{number} random features zeroed"
    figure: Figure = plt.figure(figsize=(13, 4.4))
    left, right = figure.subplots(1, 2)

    for place, measure in enumerate(("mean_cosine", "min_cosine")):
        gone = 1 - getattr(ablations.outliers.quality, measure)
        draws = [1 - getattr(draw.quality, measure) for draw in ablations.random]
        left.plot(draws, [place] * len(draws), "o", color=GRAY, markersize=7, alpha=0.6, label=drawn)
        left.plot(gone, place, "D", color=VERMILION, markersize=9, label=zeroed)
    left.set_xscale("log")
    left.set_yticks([0, 1], ["mean over\nthe sentences", "worst\nsentence"])
    left.set_ylim(1.5, -0.5)
    left.set_xlabel("1 - cosine with the untouched model")
    left.set_title("Embeddings")
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[:2], labels[:2], frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, -0.17))
    quiet(left, "both")

    layers = range(len(ablations.untouched.top_probability_by_layer))
    for draw in ablations.random:
        right.plot(layers, draw.top_probability_by_layer, "o-", color=GRAY, alpha=0.5, markersize=4, label=drawn)
    untouched = ablations.untouched.top_probability_by_layer
    right.plot(layers, untouched, "s:", color=BLUE, markersize=9, markerfacecolor="none", label="untouched")
    right.plot(layers, ablations.outliers.top_probability_by_layer, "D-", color=VERMILION, label=zeroed)
    right.set_xticks(list(layers))
    right.set_ylim(bottom=0)
    right.set_xlabel("layer")
    right.set_ylabel("top-1 softmax probability\n(mean over heads and tokens)")
    right.set_title("Attention")
    found = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))  # one entry per label
    right.legend(found.values(), found.keys(), frameon=False, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.17))
    quiet(right, "y")
    figure.suptitle("What the attention input's outlier features carry")
    figure.tight_layout()
    return figure


def draw_timing(report: Report) -> Figure:
    """Milliseconds per batch, one panel per batch size."""
    figure: Figure = plt.figure(figsize=(4.2 * len(report.timings), 4.2))
    axes = figure.subplots(1, len(report.timings), squeeze=False)
    colors, hatches = (VERMILION, BLUE, VERMILION, GRAY), ("", "//", "xx", "..")
    for axis, timed in zip(axes[0], report.timings, strict=True):
        for place, spread in enumerate(timed.times.values()):
            axis.bar(place, spread.median, 0.7, color=colors[place], hatch=hatches[place], edgecolor="white")
            below, above = spread.median - spread.lower, spread.upper - spread.median
            axis.errorbar(place, spread.median, [[below], [above]], color="black", capsize=4, linewidth=1)
            axis.annotate(
                f"{spread.median:.1f}",
                (place, spread.upper),
                (0, 4),
                textcoords="offset points",
                ha="center",
            )
        axis.set_xticks(
            range(len(timed.times)), [name.replace(", ", "\n").replace(" ", "\n", 1) for name in timed.times]
        )
        axis.set_title(f"batch of {timed.batch}, {timed.tokens} tokens each")
        axis.margins(y=0.15)
        quiet(axis, "y")
    axes[0][0].set_ylabel("ms per batch (median, quartiles)")
    figure.suptitle(f"Time per batch on {report.machine['threads']} threads: {report.machine['cpu']}")
    figure.tight_layout()
    return figure
