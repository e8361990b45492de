"""Where the outlier features are, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..pictures import BLUE, GRAY, GREEN, ORANGE, VERMILION, Figures, quiet
from .observe import Feature, Observation

if TYPE_CHECKING:
    from . import Settings

_STYLES = [(color, marker) for marker in "oDs^" for color in (VERMILION, BLUE, GREEN, ORANGE)]


def figures(seen: Observation, features: Sequence[Feature], settings: Settings) -> Figures:
    """What draws each picture, by the name of its file."""
    return {"outliers.png": partial(draw, seen, features, settings)}


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
