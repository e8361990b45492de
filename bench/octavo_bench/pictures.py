"""Pictures: colors, plain axes, how a figure becomes a file, and the one that most tables ask for."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # no window, no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import write_atomically

# Okabe and Ito's colors: told apart by the color-blind too. Markers differ as well.
BLUE, ORANGE, GREEN, VERMILION, GRAY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C", "#CC79A7"

Figures = Mapping[str, Callable[[], Figure]]  # by the name of the file, what draws it


def save_all(figures: Figures, directory: Path) -> None:
    """Draws each figure into the file of its name in `directory`."""
    for name, draw in figures.items():
        figure = draw()
        write_atomically(directory / name, partial(figure.savefig, dpi=110, bbox_inches="tight", facecolor="white"))
        plt.close(figure)


def quiet(axis: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Plain axes: a light grid behind, no frame at the top and right."""
    axis.grid(axis=grid, color="#E0E0E0", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def draw_losses(
    names: Sequence[str], values: Sequence[float], errors: Sequence[float], label: str, title: str
) -> Figure:
    """A row for each name: its loss, and a bar of twice the standard error; gray where 0 is within that."""
    figure: Figure = plt.figure(figsize=(9, 1.6 + 0.36 * len(names)))
    axis = figure.subplots()
    for place, (loss, error) in enumerate(zip(values, errors, strict=True)):
        if loss is None or not math.isfinite(loss):
            axis.annotate("not finite", (0, place), color=VERMILION, va="center")
            continue
        bar = 0.0 if error is None or math.isnan(error) else 2 * error
        color, marker = (GRAY, "o") if abs(loss) <= bar else (VERMILION, "D") if loss > 0 else (BLUE, "s")
        axis.errorbar(loss, place, xerr=bar, fmt=marker, color=color, capsize=3, markersize=6)
    axis.axvline(0, color="black", linewidth=1)
    # Linear where differences drown in their errors, logarithmic where they do not.
    known = max(min((2 * error for error in errors if error and error > 1e-9), default=1e-3), 1e-6)
    axis.set_xscale("symlog", linthresh=10.0 ** math.ceil(math.log10(known)))
    axis.margins(x=0.08)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=f"{label}\n(less is better; bars: twice the standard error)", title=title)
    quiet(axis, "both")
    figure.tight_layout()
    return figure
