"""How the benchmarks measure, beyond what `octavo_bench.measuring` has: cold caches, and the commit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
from octavo_bench.measuring.machine import Others, facts, set_threads, taken
from octavo_bench.measuring.output import write_atomically as write
from octavo_bench.measuring.turns import Spread, spreads, take_turns

__all__ = ["Evict", "Others", "Spread", "commit", "machine", "set_threads", "spreads", "take_turns", "taken", "write"]

PACKAGES = ("octavo", "torch", "numpy", "bitsandbytes", "torchao")


class Evict:
    """Reads a buffer, so that what the caches held before is gone; for the `before` of `take_turns`.

    The same buffer for every contender, so it is fair whatever a contender keeps and however it lays it out.
    `mebibytes` is read by each thread: the level-2 cache of each core is emptied by some ten times its size, the shared
    level-3 cache only by more than its own.
    """

    def __init__(self, mebibytes: int, threads: int) -> None:
        self.buffer = torch.ones(mebibytes * threads << 17, dtype=torch.int64)

    def __call__(self, _: str) -> None:
        """Read the buffer."""
        self.buffer.sum()


def machine(threads: int) -> dict[str, Any]:
    """What the numbers are measured on."""
    return facts(threads, PACKAGES) | {"commit": commit()}


def commit() -> str:
    """The commit that this file is of, with "-dirty" where files differ from it."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    return git.stdout.strip() or "unknown"
