"""Finds results below a folder: JSON, the pictures that belong to it, and what cannot be used, with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from octavo.measuring.output import Table

from .pictures import Picture, read_picture
from .readers import Result, read

_LARGEST = 64 << 20  # bytes of a file; results are far smaller


@dataclass(frozen=True)
class Run:
    """One result file. `path` is relative to the folder that was collected."""

    path: PurePosixPath
    result: Result
    pictures: list[tuple[PurePosixPath, Picture]] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        """The tables of the result."""
        return self.result.tables


@dataclass(frozen=True)
class Skipped:
    """A file that is not in the report."""

    path: PurePosixPath
    reason: str


@dataclass(frozen=True)
class Collection:
    """Everything that was found."""

    name: str
    runs: list[Run]  # quality first, then speed, each by path
    stray: list[tuple[PurePosixPath, Picture]]  # pictures that belong to no result
    skipped: list[Skipped]

    @property
    def pictures(self) -> list[tuple[PurePosixPath, Picture]]:
        """All pictures."""
        return [picture for run in self.runs for picture in run.pictures] + self.stray


def collect(directory: Path) -> Collection:
    """Read everything below `directory`.

    Raises ValueError where it is no folder or holds no results, OSError where it cannot be listed.
    """
    if not directory.is_dir():
        raise ValueError(f"report: directory: expected a folder with results, got {directory}")
    runs: list[Run] = []
    pictures: dict[PurePosixPath, Picture] = {}
    skipped: list[Skipped] = []
    for path in _files(directory):
        name = PurePosixPath(path.relative_to(directory).as_posix())
        try:
            if name.suffix == ".json":
                runs.append(Run(name, read(_parse(path), name)))
            elif name.suffix == ".svg" or not path.with_suffix(".svg").is_file():  # of two the one that scales
                pictures[name] = read_picture(_bytes(path), name)
        except (ValueError, OSError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            skipped.append(Skipped(name, reason))
    runs.sort(key=lambda run: (run.result.rank, run.path))
    stray: list[tuple[PurePosixPath, Picture]] = []
    for name, picture in pictures.items():
        owner = _owner(name, runs)
        if owner is not None and owner.tables and name.stem in {"table", "tables"}:
            skipped.append(Skipped(name, "a drawing of tables that are here as tables"))
        else:
            (stray if owner is None else owner.pictures).append((name, picture))
    if not runs and not stray:
        reasons = "".join(f"\n  {each.path}: {each.reason}" for each in skipped)
        raise ValueError(
            f"report: directory: expected JSON of octavo's commands or benchmarks, or plots, in {directory} or below, "
            f"found none{':' + reasons if reasons else ''}"
        )
    return Collection(directory.resolve().name, runs, stray, sorted(skipped, key=lambda each: each.path))


def _files(directory: Path) -> Iterator[Path]:
    """JSON and pictures below `directory`, by path."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(directory, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.endswith((".json", ".png", ".svg")):
                yield Path(folder) / name


def _bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _LARGEST:
        raise ValueError(f"{size >> 20} MiB: too large for a result")
    return path.read_bytes()


def _parse(path: Path) -> Any:
    try:
        text = _bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not JSON: not UTF-8") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _owner(picture: PurePosixPath, runs: list[Run]) -> Run | None:
    """The result that a picture belongs to: in its folder, or in the nearest one above that has any.

    Of several it is the one that names the picture, else the one whose name the picture or its folder begins with, else
    the first.
    """
    for folder in picture.parents:
        here = [run for run in runs if run.path.parent == folder]
        if here:
            claimed = next((run for run in here if picture.parent == folder and picture.name in run.result.plots), None)
            if claimed is not None:
                return claimed
            names = (picture.stem, picture.relative_to(folder).parts[0])
            named = [run for run in here if any(name.startswith(run.path.stem) for name in names)]
            return max(named, key=lambda run: len(run.path.stem), default=here[0])
    return None
