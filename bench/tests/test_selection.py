"""octavo_bench.layers.selection: the table of the path `auto` on a GPU is what it makes, and has no bad step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from octavo_bench import tables
from octavo_bench.layers import selection
from octavo_bench.layers.contenders import PATHS
from octavo_bench.layers.selection import DEVICES, EXTENTS, Device


def times(device: Device, by_mma: bool, most: int, n: int, k: int) -> dict[int, tuple[float, float]]:
    """By m: what `auto` takes, and the better of its paths."""
    found = {}
    for m in range(1, 1200):
        slow = selection.weight_only(device, by_mma, n, k, m)
        fast = selection.int8(device, by_mma, n, k, m)
        found[m] = (slow if m <= most else fast, min(slow, fast))
    return found


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.architecture}")
@pytest.mark.parametrize(
    ("n", "k"), [(512, 512), (2048, 4096), (4096, 4096), (16384, 4096), (8192, 8192), (512, 16384)]
)
def test_auto_is_never_far_from_the_better_path(device: Device, n: int, k: int) -> None:
    """Shapes in between, too: whose table is that of the nearest."""
    by_mma = device.half > 0
    rows = selection.modelled([device])[device.architecture, by_mma]
    for n_of, k_of in ((n, k), (n * 5 // 4, k * 5 // 4)):
        most = rows[selection.nearest(k_of)][selection.nearest(n_of)]
        own = times(device, by_mma, most, n_of, k_of)
        assert max(taken / best for taken, best in own.values()) <= (1.3 if n_of == n else 1.6)
        if 0 < most < 1199 and n_of == n:
            assert own[most + 1][0] <= 1.3 * own[most][0]


def test_the_table_in_use_is_the_one_that_is_made() -> None:
    text = (Path(__file__).resolve().parents[2] / "cuda" / "selection_table.hpp").read_text()
    if "// Source: the model\n" in text:
        assert text == selection.text(selection.modelled(), "the model")
    assert all(f"    {{{device.architecture}, false, {{\n" in text for device in DEVICES)
    assert "    {75, true, {\n" not in text  # there are no such instructions in its kernel


def test_equals_are_decided_for_exact_activations() -> None:
    assert selection.most_rows(lambda m: 10.0, lambda m: 10.0) == selection.ROWS[-1]
    assert selection.most_rows(lambda m: 10.0, lambda m: 9.2) == selection.ROWS[-1]
    assert selection.most_rows(lambda m: 10.0 + m, lambda m: 20.0) == 10 - 2  # of ROWS: up to 1.1 times as long
    assert selection.most_rows(lambda m: 50.0, lambda m: 10.0) == 0


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
    monkeypatch.setattr(selection, "modelled", lambda: {(90, True): [[7] * len(EXTENTS) for _ in EXTENTS]})
    selection.main([path])
    lines = [line.strip() for line in table.read_text().splitlines()]
    assert "// Source: the model, h200.json" in lines
    assert lines.count("{   7,    7,    7,    7,    7,    7,    7},") == len(EXTENTS) - 1
    assert "{   7,    7,    7,    7,    7,   16,    7}," in lines
