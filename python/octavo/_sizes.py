"""Amounts of memory as people write and read them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Bytes in "24GB", "24GiB", "0.5G" or "1000": powers of 1024 in every spelling, which is how GPUs are labelled.

    Raises argparse.ArgumentTypeError (so it can be an argument's type) for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB or 500MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(count: int) -> str:
    """The count in MiB or GiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value
