"""`octavo analyze`: the outlier features of a model, as the paper's section 4 looks at them.

A feature is an outlier feature where its magnitude is at least 6 in at least 25 % of the layers and at at least 6 % of
the sequence positions. `analysis` tells
the story from top to bottom; each chapter is a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


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
