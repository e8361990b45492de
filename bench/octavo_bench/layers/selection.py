"""Up to how many rows the path `auto` leaves X as it is on a GPU: python -m octavo_bench.layers.selection [RESULTS].

Writes cuda/selection_table.hpp. By itself it is made by a model of time (bench/cpp/selection.cpp), which divides the
products among multiprocessors by the functions that the backend itself has. Results of `octavo bench --device cuda
--json` replace the model where they measured: at the extents of the table that are nearest to theirs.

Weight-only is preferred as long as the int8 product is not a tenth faster: it rounds no activations, and the model is
no better than that. Beyond that a row more should make no layer much slower.
"""

import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from .. import tables
from . import programs
from .contenders import PATHS

TABLE = programs.ROOT / "cuda" / "selection_table.hpp"
EXTENTS = [round(2 ** (i / 2)) for i in range(18, 31)]  # k and n; what is between or beyond counts as the nearest
WORTH = 1.1  # as many times as long as the int8 product may take what rounds no activations
OUTLIERS = 6


def ask(program: Path, *words: object, given: str = "") -> list[list[float]]:
    """The numbers in each line that the model prints."""
    asked = subprocess.run([program, *map(str, words)], input=given, capture_output=True, text=True, check=True)
    return [list(map(float, line.split())) for line in asked.stdout.splitlines()]


def modelled(folder: Path) -> dict[tuple[int, bool], list[list[int]]]:
    """By architecture, and whether matrix instructions do it: a row for each k, a column for each n.

    The model is compiled into the folder. Raises RuntimeError where that cannot be done.
    """
    # The same sums for every processor.
    program = programs.compile_program("selection", folder, [programs.ROOT / "cuda"], "-ffp-contract=off")
    found = defaultdict[tuple[int, bool], list[list[int]]](list)
    for architecture, by_mma, *most in ask(program, "table", WORTH, *EXTENTS):
        found[int(architecture), bool(by_mma)].append(list(map(int, most)))
    return found


def nearest(extent: int) -> int:
    """The place of an extent in EXTENTS."""
    return min(max(round(2 * math.log2(extent)), 18), 30) - 18


def measured(report: tables.Report) -> tuple[int, dict[tuple[int, int], int]]:
    """The architecture, and the most rows of each (k, n), of 16-bit X with OUTLIERS columns."""
    capability = str(report.facts["octavo_info"]["cuda"]["devices"][0]["compute_capability"])
    table, times = report.tables[0], defaultdict[str, dict[int, tuple[float, float]]](dict)
    for row in table.rows:
        cells = dict(zip(table.columns, row, strict=True))
        slow, fast = cells[PATHS["weight_only"]], cells[PATHS["int8"]]
        if cells["outlier columns"] == OUTLIERS and None not in (slow, fast):
            times[row[0]][cells["m"]] = slow, fast
    found = {}
    for name, own in times.items():
        if not (shape := name.split(" x "))[1].isdigit():  # other options
            continue
        worse = [m for m, (slow, fast) in sorted(own.items()) if slow > WORTH * fast]
        fine = [m for m in own if not worse or m < worse[0]]
        found[int(shape[0]), int(shape[1])] = max(fine, default=0)
    return int(float(capability) * 10), found


def text(found: Mapping[tuple[int, bool], list[list[int]]], source: str) -> str:
    """The header."""
    selections = []
    for (architecture, by_mma), rows in sorted(found.items()):
        lines = "".join("        {" + ", ".join(f"{value:>4}" for value in row) + "},\n" for row in rows)
        selections.append(f"    {{{architecture}, {str(by_mma).lower()}, {{\n{lines}    }}}},\n")
    return f"""\
// Made by `python -m octavo_bench.layers.selection`, which says how. Not to be edited.
// Source: {source}
#pragma once

namespace octavo::cuda {{

// Rows by k, columns by n: powers of the root of two, from the first_extent-th on.
inline constexpr int first_extent = {2 * (EXTENTS[0].bit_length() - 1)};
inline constexpr int extents = {len(EXTENTS)};

struct Selection {{
    int architecture;  // from this on
    bool by_mma;
    short most[extents][extents];
}};

// clang-format off
inline constexpr Selection selections[] = {{
{"".join(selections)}}};
// clang-format on

}}  // namespace octavo::cuda
"""


def main(paths: Iterable[Path] = ()) -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as folder:
        found, sources = modelled(Path(folder)), ["the model"]
    for path in paths:
        architecture, most = measured(tables.read(path))
        base = max((each for each in found if each[1] and each[0] <= architecture), default=None)
        if base is None:
            raise ValueError(f"{path}: expected a GPU of compute capability 8.0 or newer, got {architecture / 10}")
        own = [list(row) for row in found[base]]
        for (k, n), rows in most.items():
            own[nearest(k)][nearest(n)] = rows
        found[architecture, True] = own
        sources.append(path.name)
    TABLE.write_text(text(found, ", ".join(sources)))


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]))
