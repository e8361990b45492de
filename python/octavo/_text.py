"""Errors, sizes and tables as people read and write them."""

import argparse
import re
from collections.abc import Iterable, KeysView, Sequence
from fnmatch import fnmatchcase

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def unexpected(where: object, expected: str, got: object, kind: type[Exception] = ValueError) -> Exception:
    """The error to raise: ``<where>: expected <expected>, got <got>``."""
    return kind(f"{where}: expected {expected}, got {shown(str(got), 300)}")


def expect(where: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise a TypeError, ``<where>: expected <expected>, got <the value's class>``, for a value of another kind."""
    if not isinstance(value, kinds):
        raise unexpected(where, expected, type(value).__name__, TypeError)


def expect_choice(where: str, value: object, choices: Sequence[object]) -> None:
    """Raise a TypeError for a value that is no string, a ValueError for one that is none of `choices`."""
    expected = " or ".join(map(repr, choices))
    expect(where, value, str, expected)
    if value not in choices:
        raise unexpected(where, expected, repr(value))


def expect_patterns(where: str, value: object) -> None:
    """Raise a TypeError where `value` is neither None nor a collection of patterns; a string is none of them."""
    if value is None:
        return
    expect(where, value, (list, tuple, set, frozenset, KeysView), "a sequence of patterns")
    for each in value:  # type: ignore[attr-defined]
        expect(where, each, str, "patterns that are strings")


def shown(text: str, limit: int = 120) -> str:
    """Text of others for a terminal: its control characters escaped, its middle left out beyond `limit` characters."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns, as in a shell, is for the whole name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def parse_size(text: str, least: int = 0) -> int:
    """Bytes in "24GB", "24GiB", "0.5G" or "1000": powers of 1024 in every spelling, which is how GPUs are labelled.

    Raises argparse.ArgumentTypeError (so it can be an argument's type) for anything else, and for less than `least`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB or 500MB, got {text!r}")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < least:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB, got {text!r}, which is {size} bytes")
    return size


def format_size(count: int) -> str:
    """The count in MiB or GiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of aligned columns, those of the numbers `left` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = ["<" if number in left else ">" for number in range(len(widths))]
    return ["  ".join(map("{:{}{}}".format, row, align, widths)).rstrip() for row in rows]
