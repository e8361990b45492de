"""Reports: one shape as JSON, as text and as Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import ROOT
from octavo_bench import tables
from octavo_bench.tables import Report, Table

TABLE = Table(
    "Losses", {"scheme": "", "loss": "+.3f", "count": "d"}, [["a | b", 0.12345, 3], ["c", math.nan, None]], "n"
)
FACTS = {"command": "octavo eval m", "cpu": "a processor", "date": "2026-11-29T10:00:00", "commit": "0123456789abcdef"}
REPORT = Report("A run", FACTS, [TABLE], ["It is so."], ["loss.png"])


def test_results_are_few_and_small() -> None:
    files = [path for path in (ROOT / "bench" / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert 0 < sum(path.suffix == ".png" for path in files) <= 10
    assert {path.suffix for path in files} <= {".json", ".png", ".csv", ".md"}


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    tables.write_text(path, REPORT.json())
    found = tables.read(path)
    assert found.facts == FACTS
    assert found.tables[0].columns == TABLE.columns
    assert found.tables[0].rows == [["a | b", 0.12345, 3], ["c", None, None]]  # what is not finite is null
    assert (found.title, found.conclusions, found.pictures) == ("A run", ["It is so."], ["loss.png"])
    assert '\n  ["a | b", 0.12345, 3]' in path.read_text(), "a line for each row"
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 2, "title": "t"}'])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other.json: expected a report of format 2, got "):
        tables.read(path)


def test_text_and_markdown_show_the_formats() -> None:
    assert TABLE.text().splitlines()[2:6] == [
        "scheme    loss  count",
        "-" * 21,
        "a | b   +0.123      3",
        "c            -      -",
    ]
    assert TABLE.markdown().splitlines()[2] == "| a \\| b | +0.123 | 3 |"
    assert "commit 0123456789ab" in REPORT.text()
    assert "- It is so." in REPORT.markdown()
    assert REPORT.table("Loss") is TABLE
    with pytest.raises(ValueError, match="expected a table 'Time'"):
        REPORT.table("Time")


def test_a_file_that_fails_to_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(beside: Path) -> None:
        beside.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        tables.write_atomically(path, fail)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]


def test_results_in_the_repository_can_be_read() -> None:
    folder = Path(__file__).resolve().parents[1] / "results"
    found = sorted(folder.rglob("*.json"))
    assert found, "no results"
    for path in found:
        report = tables.read(path)
        assert {"command", "date"} <= set(report.facts), path
        assert report.tables, path
        assert all((path.parent / name).is_file() for name in report.pictures), path
        json.loads(report.json())
    pictures = list(folder.rglob("*.png"))
    assert len(pictures) <= 10
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2 << 20
