"""`octavo eval`: what the schemes of the paper's Table 1 cost a model, and SmoothQuant and peers beside them.

Of a causal language model the divergence from the model as it is, its likeliest tokens, its perplexity on a text and
its accuracy on a task file; of an encoder its embeddings. Each variant sees the same windows, one in each call, so that
the columns that are outlying in one have no part in another; differences are paired window by window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How much to measure."""

    schemes: Sequence[str] | None = None  # keys of variants; None: all but peers
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
