"""The options that `octavo eval` and `octavo analyze` share, and what has to be done before torch is imported."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def add_model_and_text(parser: argparse.ArgumentParser) -> None:
    """The model, the text, and how much of it; then what to write."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder: config, weights, tokenizer")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to run the model on")
    parser.add_argument(
        "--window", type=positive, metavar="N", help="tokens at a time; default: what the model takes, at most 512"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N windows; default: all")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything that was measured")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the pictures (PNG)")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all cores")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def missing_packages(names: Sequence[str], install: str = "octavo-bench") -> str | None:
    """What to say where packages are missing; None where all are there."""
    missing = [name.replace("_", "-") for name in names if importlib.util.find_spec(name) is None]
    return f"missing {', '.join(missing)}; install with: pip install {install}" if missing else None


def prepare(args: argparse.Namespace) -> None:
    """Check packages and output folders now, not after minutes of work; make idle threads sleep.

    Raises RuntimeError where a package is missing, OSError where a folder cannot be made.
    """
    needed = ("torch", "transformers", "tqdm", *(["matplotlib"] if args.plots else []))
    missing = missing_packages(needed)
    if missing:
        raise RuntimeError(missing)
    wait_passively()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)


def wait_passively() -> None:
    """Makes idle OpenMP threads sleep. Must come before torch is imported, which reads this when loaded.

    By default they spin, and where the cores are shared that takes from the threads that have work to do.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
