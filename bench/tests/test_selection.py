"""octavo_bench.layers.selection: the table of the path `auto` on a GPU is what it makes, and has no bad step."""

import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from octavo_bench import tables
from octavo_bench.layers import programs, selection
from octavo_bench.layers.contenders import PATHS
from octavo_bench.layers.selection import EXTENTS, nearest

Table = dict[tuple[int, bool], list[list[int]]]

# Architecture, and whether matrix instructions multiply: 169 shapes of each.
KINDS_OF_TABLE = ((75, False), (80, False), (80, True), (90, False), (90, True), (120, False), (120, True))
STEP = 1.3

KINDS = pytest.mark.parametrize("kind", KINDS_OF_TABLE, ids=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def modelled(folder: Path) -> Table:
    return selection.modelled(folder)


@pytest.fixture(scope="module")
def ask(folder: Path, modelled: Table) -> Any:
    """selection.ask of the program that `modelled` has compiled."""
    return partial(selection.ask, folder / "selection")


def worst(ask: Any, modelled: Table, kind: tuple[int, bool], shapes: list[tuple[int, int]]) -> list[list[float]]:
    """Of each (k, n), by the table's entry of the nearest: what a row more costs at most, and the other path saves."""
    given = [(kind[0], int(kind[1]), k, n, modelled[kind][nearest(k)][nearest(n)]) for k, n in shapes]
    found: list[list[float]] = ask("worst", given="\n".join(" ".join(map(str, line)) for line in given))
    assert len(found) == len(shapes)
    return found


@KINDS
def test_a_row_more_is_never_much_slower(kind: tuple[int, bool], modelled: Table, ask: Any) -> None:
    more = [step for step, _ in worst(ask, modelled, kind, [(k, n) for k in EXTENTS for n in EXTENTS])]
    assert len(more) == 169
    assert max(more) <= STEP


@KINDS
@pytest.mark.parametrize(
    ("n", "k"), [(512, 512), (2048, 4096), (4096, 4096), (16384, 4096), (8192, 8192), (512, 16384)]
)
def test_auto_is_never_far_from_the_better_path(
    kind: tuple[int, bool], n: int, k: int, modelled: Table, ask: Any
) -> None:
    """Shapes in between, too: whose table is that of the nearest."""
    (_, own), (_, between) = worst(ask, modelled, kind, [(k, n), (round(k * 1.19), round(n * 1.19))])
    assert 1 <= own <= 1.35
    assert 1 <= between <= 1.6


def test_the_table_in_use_is_the_one_that_is_made(modelled: Table) -> None:
    assert set(modelled) == set(KINDS_OF_TABLE)
    text = selection.TABLE.read_text()
    if "// Source: the model\n" in text:
        assert text == selection.text(modelled, "the model")
    assert all(f"    {{{architecture}, false, {{\n" in text for architecture, _ in KINDS_OF_TABLE)
    assert "    {75, true, {\n" not in text  # there are no such instructions in its kernel


def test_the_guide_has_the_targets_of_the_model(ask: Any) -> None:
    """Lines for each GPU and shape: over torch, alone and of three; what 64 columns multiply the time by."""
    guide = (programs.ROOT / "docs" / "guide" / "cuda.md").read_text()
    names = {80: "A100", 90: "H200"}
    found: dict[str, list[float]] = {}
    for architecture, k, n, _, half, auto, columns, kept, shared in ask("targets", selection.WORTH):
        name = f"{names[int(architecture)]}, {k:.0f} x {n:.0f}"
        found.setdefault(name, []).append(half / auto)
        found.setdefault(f"{name}, of three", []).append(half / shared)
        assert half >= shared or k != 2560
        found.setdefault(f"{name}, 64 columns", []).append(columns / auto)
        found.setdefault(f"{name}, 64 kept", []).append(kept)
        assert columns <= auto * (1.05 if k >= 4096 else 1.15)
        assert kept <= (1.05 if k >= 4096 else 1.1)
    for name, figures in found.items():
        assert f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |\n" in guide
    assert len(found) == 40


def test_tiles_that_there_are_not_would_gain_little_or_make_a_step(folder: Path, modelled: Table) -> None:
    """Of five, which the guide names, each with the most that it would gain anywhere."""
    guide = (programs.ROOT / "docs" / "guide" / "cuda.md").read_text()
    command = [folder / "selection", "candidates", str(selection.WORTH)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for line in lines:
        name, gain, _, _, _, twentieth, most, more = line.split()
        assert 1 <= float(gain) < selection.WORTH or float(more) > STEP
        shown = name.replace("_", " ").replace("x", " x ")
        assert f"| {shown} | {float(gain):.2f} | {twentieth} | {float(most):.2f} | {float(more):.2f} |\n" in guide
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("weight_only", "int8", "most"),
    [
        ((10.0, 0.0), (10.0, 0.0), 4096),
        ((10.0, 0.0), (9.2, 0.0), 4096),
        ((10.0, 1.0), (20.0, 0.0), 12),  # up to 1.1 times as long
        ((50.0, 0.0), (10.0, 0.0), 0),
    ],
)
def test_equals_are_decided_for_exact_activations(ask: Any, weight_only: Any, int8: Any, most: int) -> None:
    """Of times of no rows, and of each row more."""
    assert ask("decide", selection.WORTH, *weight_only, *int8) == [[most]]


def report(rows: list[list[Any]]) -> tables.Report:
    names = ["k x n", "m", "outlier columns", "octavo int8, ms", PATHS["int8"], PATHS["weight_only"]]
    table = tables.Table("", dict.fromkeys(names, ""), rows)
    facts = {"octavo_info": {"cuda": {"devices": [{"compute_capability": "9.0"}]}}}
    return tables.Report("octavo bench", facts, [table])


def test_measurements_replace_the_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[Any]] = [["4096 x 16384", m, 6, 1.0, 1.0, ratio] for m, ratio in ((1, 0.7), (16, 1.05), (64, 1.4))]
    rows += [["4096 x 16384", 256, 0, 1.0, 1.0, 0.1], ["4096 x 16384", 1024, 6, 1.0, 1.0, None]]
    rows += [["4096 x 16384 tensor", 256, 6, 1.0, 1.0, 0.9], ["lowest ratio", None, None, None, 1.0, 0.1]]
    assert selection.measured(report(rows)) == (90, {(4096, 16384): 16})
    path, table = tmp_path / "h200.json", tmp_path / "table.hpp"
    path.write_text(report(rows).json())
    monkeypatch.setattr(selection, "TABLE", table)
    monkeypatch.setattr(selection, "modelled", lambda folder: {(90, True): [[7] * len(EXTENTS) for _ in EXTENTS]})
    selection.main([path])
    lines = [line.strip() for line in table.read_text().splitlines()]
    assert "// Source: the model, h200.json" in lines
    plain = ["   7"] * len(EXTENTS)
    assert lines.count(f"{{{', '.join(plain)}}},") == len(EXTENTS) - 1
    plain[selection.nearest(16384)] = "  16"
    assert f"{{{', '.join(plain)}}}," in lines


def test_without_the_sources_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match=r"expected .*bench/cpp/selection\.cpp, got none"):
        selection.main()
