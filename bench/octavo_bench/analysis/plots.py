"""The report as pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from octavo_bench.measuring.drawing import BLUE, GRAY, GREEN, ORANGE, VERMILION, draw_tables, quiet

from .report import POLICY_NAMES, Report, tables
from .worth import POLICIES, root_mean_square

_STYLES = [(color, marker) for marker in "oDs^" for color in (VERMILION, BLUE, GREEN, ORANGE)]
_SHOWN = 60  # columns of the heat map


def figures(report: Report) -> dict[str, Callable[[], Figure]]:
    """What draws each picture, by the name of its file."""
    return {
        "emergence.png": partial(draw_emergence, report),
        "magnitudes.png": partial(draw_magnitudes, report),
        "columns.png": partial(draw_columns, report),
        "worth.png": partial(draw_worth, report),
        "tables.png": partial(draw_tables, tables(report)),
    }


def draw_emergence(report: Report) -> Figure:
    """At what share of positions the outlier features are outlying, layer by layer, and how many columns are."""
    figure: Figure = plt.figure(figsize=(12, 4.4))
    left, right = figure.subplots(1, 2)
    share = np.array(report.by_layer)  # [layers, width]
    layers = range(len(share))
    for place, (feature, (color, marker)) in enumerate(zip(report.features, _STYLES, strict=False)):
        # Lines that lie on each other stay to be seen: those drawn later are thinner.
        size = max(4.0, 14.0 - 2.0 * place)
        label = f"feature {feature.number}"
        values = 100 * share[:, feature.number]
        left.plot(layers, values, marker + "-", color=color, label=label, markersize=size, linewidth=size / 3)
    left.set_ylabel(f"positions with magnitude >= {report.settings['threshold']:g}, %")
    left.set_title("The outlier features" if report.features else "No feature is outlying systematically")
    left.set_ylim(-4, 106)
    if report.features:
        left.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    minimum = report.settings["min_positions"]
    right.bar(layers, (share > 0).sum(1), color=GRAY, label="at any position")
    right.bar(layers, (share >= max(minimum, 1e-12)).sum(1), color=BLUE, label=f"at {minimum:.0%} of positions")
    right.set_ylabel("features")
    right.set_title("Features of the hidden states that are outlying")
    right.set_ylim(0, max(1.0, 1.05 * float((share > 0).sum(1).max())))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    for axis in (left, right):
        axis.set_xlabel("layer")
        axis.set_xticks(list(layers))
        axis.set_xlim(-0.5, len(share) - 0.5)
        quiet(axis, "y")
    figure.tight_layout()
    return figure


def draw_magnitudes(report: Report) -> Figure:
    """The largest magnitude of every feature of the hidden states, a dot for each layer."""
    figure: Figure = plt.figure(figsize=(9, 4.6))
    axis = figure.subplots()
    for magnitudes in report.magnitudes:
        axis.plot(magnitudes, ".", color=GRAY, markersize=3)
    for feature, (color, marker) in zip(report.features, _STYLES, strict=False):
        own = [magnitudes[feature.number] for magnitudes in report.magnitudes]
        label = f"feature {feature.number}"
        axis.plot([feature.number] * len(own), own, marker, color=color, markersize=5, label=label)
    threshold = report.settings["threshold"]
    axis.axhline(threshold, color="black", linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("feature (a dot for each layer)")
    axis.set_ylabel("largest magnitude at any position")
    axis.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    quiet(axis, "y")
    figure.tight_layout()
    return figure


def draw_columns(report: Report) -> Figure:
    """Which columns of which linear layer's input are outlying, and at what share of positions."""
    total: dict[tuple[bool, int], float] = {}  # feature of a hidden state or of the feed-forward's inside
    inside = "feed-forward hidden"
    for found in report.projections:
        for column, share in zip(found.columns, found.share, strict=True):
            key = (found.takes == inside, column)
            total[key] = total.get(key, 0.0) + share
    # The most common ones, in their own order: hidden states first.
    shown = sorted(sorted(total, key=lambda key: (-total[key], key))[:_SHOWN])
    heat = np.zeros((len(report.projections), max(len(shown), 1)))
    for row, found in enumerate(report.projections):
        for column, share in zip(found.columns, found.share, strict=True):
            key = (found.takes == inside, column)
            if key in shown:
                heat[row, shown.index(key)] = 100 * share
    figure: Figure = plt.figure(figsize=(3.5 + 0.2 * heat.shape[1], 1.6 + 0.19 * heat.shape[0]))
    axis = figure.subplots()
    # Systematic columns are at most positions, many others at one of thousands: only a logarithm shows both.
    norm = LogNorm(vmin=min(1.0, heat[heat > 0].min(initial=1.0)), vmax=100)
    image = axis.imshow(np.ma.masked_equal(heat, 0), aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(heat)), [f"{found.layer} {found.name}" for found in report.projections], fontsize=7)
    names = [f"{column}{'*' if hidden else ''}" for hidden, column in shown]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_xlabel("column (*: of the feed-forward's inside)")
    left_out = len(total) - len(shown)
    title = "Outlier columns" + (f", the {len(shown)} most common of {len(total)}" if left_out else "")
    axis.set_title(title if shown else "No outlier columns")
    figure.colorbar(image, label="positions, % (white: none)")
    figure.tight_layout()
    return figure


def draw_worth(report: Report) -> Figure:
    """The error of each linear layer with dequantized outlier weights and with kept ones."""
    figure: Figure = plt.figure(figsize=(9, 2.2 + 0.19 * (len(report.worths) + 1)))
    axis = figure.subplots()
    names = ["all: root mean square", *(f"{worth.layer} {worth.name}" for worth in report.worths)]
    places = np.arange(len(names))
    markers = {"columns": "o", "rows": "x", "static": "s"}
    for policy, (keeps, outliers) in POLICIES.items():
        errors = [root_mean_square(report.worths, policy), *(worth.errors[policy] for worth in report.worths)]
        values = np.array([100 * error if error > 0 else np.nan for error in errors])  # none on a logarithm
        color, face = (BLUE, "none") if keeps else (VERMILION, None)
        axis.plot(
            values,
            places,
            markers[outliers],
            color=color,
            markerfacecolor=face,
            markersize=6,
            label=POLICY_NAMES[policy],
        )
    axis.axhline(0.5, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(places, names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("error of the output, % of its norm")
    axis.set_title("What the 16-bit weights of outlier columns are worth")
    axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12 * 6 / figure.get_figheight()))
    quiet(axis, "x")
    figure.tight_layout()
    return figure
