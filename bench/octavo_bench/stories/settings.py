"""How much the stories measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Demo:
    """How much to measure. The defaults are the demo's; tests measure less."""

    sentences: int = 200
    calibration: int = 64
    draws: int = 3  # of random features, for the ablation
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    seconds: float = 2.5  # of timing, for each batch size and dtype


@dataclass(frozen=True)
class Evidence:
    """How much to measure."""

    windows: int = 100  # of held-out text
    close_windows: int = 2000  # for what is as good as float32, or nearly: differences of 1e-4 need this many
    analyzed: int = 40  # windows of `octavo analyze`
    sentences: int = 200
    calibration_windows: int = 16  # of text; of MiniLM: all its calibration sentences
    calibration_sentences: int = 64
    seconds: float = 8.0  # of timing peers, for each model
    draws: int = 3  # of random features
