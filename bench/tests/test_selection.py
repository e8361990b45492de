"""octavo_bench.layers.selection: the table of the path `auto` on a GPU is what it makes, and has no bad step."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo_bench import tables
from octavo_bench.layers import selection
from octavo_bench.layers.contenders import PATHS
from octavo_bench.layers.selection import DEVICES, EXTENTS, POINTS, STEP, Device

CUDA = Path(__file__).resolve().parents[2] / "cuda"
KINDS = [(device, by_mma) for device in DEVICES for by_mma in ((False, True) if device.half else (False,))]

# Of the table's 169 shapes, in how many a row more costs more than STEP somewhere, and the most that it costs.
#
# By matrix instructions it is the first row of a row of tiles more (m = 128, 192, 256, 320, 384, 448), where all
# multiprocessors have one tile and those of few rows come on top, and k is too short to be shared; on sm_90 the change
# from one path to the other at 2048 rows of the smallest layers. By dot products it is the fourth or fifth row of X in
# float32: a second tile of four makes all codes float32 again, where the int8 product, three launches, takes longer
# yet. Before sm_80 cuBLASLt multiplies, whose tiles are guessed.
STEPS = {
    (75, False): (12, 1.38),
    (80, False): (25, 1.58),
    (80, True): (5, 1.32),
    (90, False): (17, 1.46),
    (90, True): (2, 1.3),
    (120, False): (5, 1.34),
    (120, True): (6, 1.33),
}


def times(device: Device, by_mma: bool, most: int, n: int, k: int) -> tuple[Any, Any, Any]:
    """selection.taken of a shape."""
    slow = selection.weight_only(device, by_mma, n, k, POINTS)
    return selection.taken(most, slow, selection.int8(device, by_mma, n, k, POINTS))


@pytest.fixture(scope="module")
def modelled() -> dict[tuple[int, bool], list[list[int]]]:
    return selection.modelled()


@pytest.mark.parametrize(("device", "by_mma"), KINDS, ids=lambda value: str(getattr(value, "architecture", value)))
def test_a_row_more_is_never_much_slower(device: Device, by_mma: bool, modelled: Any) -> None:
    rows = modelled[device.architecture, by_mma]
    worst = [
        float(times(device, by_mma, rows[i][j], n, k)[1].max())
        for i, k in enumerate(EXTENTS)
        for j, n in enumerate(EXTENTS)
    ]
    beyond = [step for step in worst if step > STEP]
    assert (len(beyond), round(max(worst), 2) if beyond else 0.0) == STEPS[device.architecture, by_mma]


@pytest.mark.parametrize(("device", "by_mma"), KINDS, ids=lambda value: str(getattr(value, "architecture", value)))
@pytest.mark.parametrize(
    ("n", "k"), [(512, 512), (2048, 4096), (4096, 4096), (16384, 4096), (8192, 8192), (512, 16384)]
)
def test_auto_is_never_far_from_the_better_path(device: Device, by_mma: bool, n: int, k: int, modelled: Any) -> None:
    """Shapes in between, too: whose table is that of the nearest."""
    rows = modelled[device.architecture, by_mma]
    for n_of, k_of in ((n, k), (round(n * 1.19), round(k * 1.19))):
        ratios = times(device, by_mma, rows[selection.nearest(k_of)][selection.nearest(n_of)], n_of, k_of)[2]
        assert ratios.max() <= (1.35 if n_of == n else 1.6)


PROGRAM = """
#include "division.hpp"
#include <cstdio>
using namespace octavo::cuda;
int main() {
    long kind, m, n, k, count, a, b, c;
    while (std::scanf("%ld %ld %ld %ld %ld %ld %ld %ld", &kind, &m, &n, &k, &count, &a, &b, &c) == 8) {
        if (kind == 0) {
            const Division found = divide_product(m, n, k, count, static_cast<Choice>(a));
            std::printf("%ld %ld %.17g\\n", static_cast<long>(found.tile), static_cast<long>(found.parts), found.cost);
        } else {
            const Split found = split_weight_only(m, n, k, count, a, b, c);
            std::printf("%ld %ld %.17g\\n", static_cast<long>(found.warps), static_cast<long>(found.parts), found.cost);
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to run cuda/division.hpp")
def test_products_are_divided_as_the_backend_divides_them(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(PROGRAM)
    program = tmp_path / "main"
    subprocess.run(["g++", "-std=c++20", f"-I{CUDA}", str(tmp_path / "main.cpp"), "-o", str(program)], check=True)
    device = DEVICES[2]
    m = np.array([1, 7, 16, 17, 33, 64, 65, 100, 128, 129, 257, 384, 700, 2049])
    asked, expected = [], []
    for n, k in ((1, 1), (40, 4112), (768, 3072), (1024, 16384), (4096, 11008), (5120, 5120), (28672, 8192)):
        for has_wgmma in (True, False):
            cost, tile, parts = selection.divide_product(device, n, k, m, has_wgmma)
            asked += [f"0 {rows} {n} {k} {device.multiprocessors} {0 if has_wgmma else 2} 0 0" for rows in m]
            expected += list(zip(tile, parts, cost, strict=True))
        for tile_rows, resident, most in ((8, 2, 8), (32, 2, 4), (64, 1, 1)):
            split = selection.split_weight_only(device, n, k, m, tile_rows, resident, most)
            asked += [f"1 {rows} {n} {k} {device.multiprocessors} {tile_rows} {resident} {most}" for rows in m]
            expected += list(zip(split.warps, split.parts, split.cost, strict=True))
    answer = subprocess.run([program], input="\n".join(asked), capture_output=True, text=True, check=True).stdout
    found = [tuple(map(float, line.split())) for line in answer.splitlines()]
    np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-12)


def test_the_table_in_use_is_the_one_that_is_made(modelled: Any) -> None:
    text = (CUDA / "selection_table.hpp").read_text()
    if "// Source: the model\n" in text:
        assert text == selection.text(modelled, "the model")
    assert all(f"    {{{device.architecture}, false, {{\n" in text for device in DEVICES)
    assert "    {75, true, {\n" not in text  # there are no such instructions in its kernel


def test_equals_are_decided_for_exact_activations() -> None:
    flat = np.full(POINTS.shape, 10.0)
    assert selection.most_rows(flat, flat) == selection.ROWS[-1]
    assert selection.most_rows(flat, flat - 0.8) == selection.ROWS[-1]
    assert selection.most_rows(flat + POINTS, flat + 10.0) == 12  # up to 1.1 times as long
    assert selection.most_rows(5.0 * flat, flat) == 0


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
    plain = ["   7"] * len(EXTENTS)
    assert lines.count(f"{{{', '.join(plain)}}},") == len(EXTENTS) - 1
    plain[selection.nearest(16384)] = "  16"
    assert f"{{{', '.join(plain)}}}," in lines
