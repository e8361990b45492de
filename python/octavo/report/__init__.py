"""`octavo report`: what `octavo demo`, `eval`, `analyze` and the benchmarks wrote, as one HTML page.

The page needs nothing beside it: style and pictures are in it, no script, no network. It follows the reader's choice
of light or dark and fits a phone. `write` reads the folder (`collect`), and puts it out (`page`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.measuring.output import write_atomically

if TYPE_CHECKING:
    from .collect import Collection

__all__ = ["write"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `octavo report`."""
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="results (JSON, PNG, SVG), also in folders below it"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page; default: DIR/report.html")


def main(args: argparse.Namespace) -> int:
    """`octavo report`: writes the page and says what is in it. Returns the exit status."""
    from .collect import collect

    found = collect(args.directory)
    path = _write(found, args.output or args.directory / "report.html")
    tables = sum(len(run.tables) for run in found.runs)
    print(f"{path}: {tables} tables and {len(found.pictures)} pictures of {len(found.runs)} results")
    for each in found.skipped:
        print(f"left out: {each.path}: {each.reason}")
    return 0


def write(directory: str | Path, output: str | Path | None = None) -> Path:
    """Collect the results below a folder into one self-contained HTML page.

    Args:
        directory: with JSON that ``octavo demo``, ``octavo eval --json``, ``octavo analyze --json`` or a script of
            ``bench/`` wrote, or any that has ``tables`` (a list of objects with ``title``, ``columns``, ``rows`` and
            ``note``), and PNG or SVG pictures beside it or in folders below. Folders and files whose names begin with
            a dot are not looked at. Other JSON and broken pictures are listed at the end of the page, with the reason.
        output: the page, written beside and renamed; its folder is made. Default: ``report.html`` in `directory`.

    Returns:
        The path of the page.

    Raises:
        ValueError: `directory` is not a folder, or holds no results.
        OSError: it cannot be read, or the page not written.
    """
    from .collect import collect

    return _write(collect(Path(directory)), Path(output) if output is not None else Path(directory) / "report.html")


def _write(found: Collection, output: Path) -> Path:
    from .page import page

    text = page(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"))
    return output
