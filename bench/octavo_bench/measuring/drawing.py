"""Pictures: colors, tables drawn, and how a figure becomes a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # no window, no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .output import Table, write_atomically

# Okabe and Ito's colors: told apart by the color-blind too. Markers differ as well.
BLUE, ORANGE, GREEN, VERMILION, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
DPI = 130


def save_all(figures: Mapping[str, Callable[[], Figure]], directory: Path) -> list[Path]:
    """Draws each figure into the file of its name in `directory`; returns their paths."""
    paths = []
    for name, draw in figures.items():
        figure = draw()
        save = partial(figure.savefig, dpi=DPI, bbox_inches="tight", facecolor="white")
        write_atomically(directory / name, save)
        plt.close(figure)
        paths.append(directory / name)
    return paths


def draw_tables(drawn: Sequence[Table]) -> Figure:
    """The tables on one page."""
    row, character = 0.23, 0.083  # inches
    heights = [row * (len(table.rows) + 3.5 + bool(table.note)) for table in drawn]
    widths = [sum(_widths(table)) + 2 * len(table.columns) for table in drawn]
    notes = [len(table.note) for table in drawn]
    figure: Figure = plt.figure(figsize=(character * max(widths + notes), sum(heights)))
    bottom = sum(heights)
    for table, height in zip(drawn, heights, strict=True):
        bottom -= height
        axis = figure.add_axes((0, bottom / sum(heights), 1, height / sum(heights)))
        axis.set_xlim(0, max(widths + notes))
        axis.set_ylim(height / row, 0)
        axis.axis("off")
        _draw_table(axis, table)
    return figure


def _draw_table(axis: Axes, table: Table) -> None:
    """One table: x in characters, y in rows."""
    ends, right = [], 0
    for width in _widths(table):
        right += width + 2
        ends.append(right - 2)
    axis.text(0, 0.6, table.title, fontsize=11, fontweight="bold", va="center")
    for line, cells in enumerate([table.columns, *table.rows]):
        axis.text(0, line + 1.7, cells[0], fontsize=10, va="center")
        for cell, end in zip(cells[1:], ends[1:], strict=True):
            axis.text(end, line + 1.7, cell, fontsize=10, va="center", ha="right")
    for y in (1.2, 2.2, len(table.rows) + 2.2):
        axis.plot([0, ends[-1]], [y, y], color="black", linewidth=0.8)
    if table.note:
        axis.text(0, len(table.rows) + 2.7, table.note, fontsize=9, va="center", color="#404040")


def _widths(table: Table) -> list[int]:
    return [max(len(cells[i]) for cells in [table.columns, *table.rows]) for i in range(len(table.columns))]


def quiet(axis: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Plain axes: a light grid behind, no frame at the top and right."""
    axis.grid(axis=grid, color="#E0E0E0", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
