"""Results as tables of text and as JSON, and files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table as text: the first column is a name, the others hold numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def as_text(table: Table) -> str:
    """The table for a terminal."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]

    def laid_out(line: list[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    rule = "-" * len(laid_out(table.columns).ljust(sum(widths) + 2 * (len(widths) - 1)))
    text = [table.title, rule, laid_out(table.columns), rule, *map(laid_out, table.rows), rule]
    return "\n".join([*text, table.note] if table.note else text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(content: Any) -> str:
    """Indented JSON. Numbers that are not finite are null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False, default=str)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(beside)` writes a file beside `path`, which then takes its name: nobody sees half a file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        beside.chmod(0o644)  # mkstemp makes it the owner's only
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def put_out(text: str, content: Any, json_path: Path | None) -> None:
    """Write a report's content as JSON where a path is given, and print its text: who reads that may be gone."""
    if json_path:
        write_atomically(json_path, lambda path: path.write_text(to_json(content) + "\n"))
    print(text)
