"""Results: tables, and the facts of the run that made them. A result file is a report as JSON, and nothing else.

Pure Python: the documentation reads result files with it.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 2  # of result files

Cell = str | int | float | None  # None: nothing to be told


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each a name."""

    title: str
    columns: Mapping[str, str]  # the heads, and the format of the numbers below each: ".2f", or "" as they are
    rows: Sequence[Sequence[Any]]  # of `Cell`, one for each column
    note: str = ""  # how to read it

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        formats = list(self.columns.values())
        return [[_shown(cell, form) for cell, form in zip(row, formats, strict=True)] for row in self.rows]

    def column(self, name: str) -> list[Any]:
        """The cells below a head."""
        place = list(self.columns).index(name)
        return [row[place] for row in self.rows]

    def text(self) -> str:
        """For a terminal."""
        lines = [list(self.columns), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pairs = [list(zip(line, widths, strict=True)) for line in lines]
        laid_out = ["  ".join([c.ljust(w), *(c.rjust(w) for c, w in rest)]) for (c, w), *rest in pairs]
        rule = "-" * len(laid_out[0])
        return "\n".join([self.title, rule, laid_out[0], rule, *laid_out[1:], rule, *filter(None, [self.note])])

    def markdown(self) -> str:
        """For the documentation: the table alone, with its note, without its title."""
        lines = [list(self.columns), ["---", *["---:"] * (len(self.columns) - 1)], *self.cells()]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") or " " for cell in line) + " |" for line in lines)
        return f"{text}\n\n{self.note}" if self.note else text


def _shown(cell: Cell, form: str) -> str:
    if cell is None or cell != cell:
        return "-"
    if isinstance(cell, float) and math.isfinite(cell) and form.endswith("f") and abs(cell) >= 1e5:
        form = "+.3g" if form.startswith("+") else ".3g"
    return cell if isinstance(cell, str) else format(cell, form)


@dataclass(frozen=True)
class Report:
    """One run."""

    title: str
    facts: Mapping[str, Any]  # the command, the commit, the machine, the packages, the date, the settings
    tables: Sequence[Table]  # in the order of the story
    conclusions: Sequence[str] = ()  # sentences that were made from the measured values
    pictures: Sequence[str] = ()  # names of files in the same folder
    failure: str = ""  # what went wrong that must not go unnoticed; the command then ends with 1

    def table(self, title: str) -> Table:
        """The first table whose title begins so. Raises ValueError where there is none."""
        for table in self.tables:
            if table.title.startswith(title):
                return table
        raise ValueError(f"{self.title}: expected a table {title!r}, got {[table.title for table in self.tables]}")

    def head(self) -> str:
        """What was run, where and when, in one line."""
        facts = self.facts
        words = [f"`{facts['command']}`", str(facts["gpu"] if "gpu" in facts else facts["cpu"])]
        words += [f"{facts['threads']} of {facts['cores']} cores"] if "threads" in facts else []
        words += [f"{name} {version}" for name, version in facts.get("packages", {}).items()]
        words += [str(facts["date"])[:10], f"commit {str(facts.get('commit', 'unknown'))[:12]}"]
        words += [f"{facts['seconds']:.0f} s"] if "seconds" in facts else []
        return ", ".join(words)

    def text(self) -> str:
        """For a terminal."""
        lines = "\n".join(f"- {line}" for line in self.conclusions)
        return "\n\n".join([self.title, *(table.text() for table in self.tables), *filter(None, [lines]), self.head()])

    def markdown(self) -> str:
        """For the documentation, pictures left out."""
        parts = [f"# {self.title}", self.head()]
        parts += ["\n".join(f"- {line}" for line in self.conclusions)] if self.conclusions else []
        return "\n\n".join([*parts, *(f"## {table.title}\n\n{table.markdown()}" for table in self.tables)]) + "\n"

    def json(self) -> str:
        """The file. Numbers that are not finite are null."""
        about = {name: getattr(self, name) for name in ("title", "facts", "conclusions", "pictures")}
        text = json.dumps(_finite({"format": FORMAT, **about}), indent=1)
        tables = ",\n".join(_table_json(table) for table in self.tables)
        return f'{text[:-2]},\n "tables": [\n{tables}\n]\n}}\n'


def _table_json(table: Table) -> str:
    """A line for each row."""
    about = {"title": table.title, "columns": list(table.columns), "formats": list(table.columns.values())}
    head = json.dumps({**about, "note": table.note})
    rows = ",\n".join("  " + json.dumps(_finite(list(row))) for row in table.rows)
    return f' {head[:-1]}, "rows": [\n{rows}\n ]}}'


def read(path: Path) -> Report:
    """A result file. Raises ValueError, which names it, for another one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        tables = [
            Table(each["title"], dict(zip(each["columns"], each["formats"], strict=True)), each["rows"], each["note"])
            for each in content["tables"]
        ]
        return Report(content["title"], content["facts"], tables, content["conclusions"], content["pictures"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a report of format {FORMAT}, got {error}") from error


def _finite(value: Any) -> Any:
    """As JSON has it, but null in the place of numbers that are not finite."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(partial)` writes a file next to `path`, which then gets its name: nobody sees half a file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o644)  # mkstemp makes it the owner's only
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A file of UTF-8, whole or not at all."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
