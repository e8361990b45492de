"""Up to how many rows the path `auto` leaves X as it is on a GPU: python -m octavo_bench.layers.selection [RESULTS].

Writes cuda/selection_table.hpp. By itself it is made by a model of time: bytes over bandwidths, instructions as the
machine code has them (.ci/cuda_bounds.txt), products over shares of the peak. Results of `octavo bench --device cuda
--json` replace the model where they measured: at the extents of the table that are nearest to theirs.

Weight-only is preferred as long as the int8 product is not a tenth faster: it rounds no activations, and the model is
no better than that.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import tables
from .contenders import PATHS

TABLE = Path(__file__).resolve().parents[3] / "cuda" / "selection_table.hpp"
EXTENTS = [2**i for i in range(9, 16)]  # k and n; what is smaller or larger counts as the nearest of these
ROWS = (0, 1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096)
# Where times can have a step, and up to where every row counts.
POINTS = sorted({*range(1, 65), 96, 97, *(m for edge in range(64, ROWS[-1] + 1, 64) for m in (edge, edge + 1))})
WORTH = 1.1  # as many times as long as the int8 product may take what rounds no activations
LAUNCH = 2.0  # microseconds until the first block starts and after the last has ended; between launches, half of it
OUTLIERS = 6
# Rows, columns, and what they reach of `Device.int8` (cuda/mma_tile.cuh, cuda/linear_wgmma.cuh).
TILES = ((256, 128, 1.0), (128, 128, 0.93), (64, 64, 0.66))
GROUP_TILES = ((128, 256, 1.15), (128, 128, 1.04))


@dataclass(frozen=True)
class Device:
    """What a GPU does in a microsecond, as far as kernels that are written so get there."""

    architecture: int
    memory: float  # bytes
    cache: float  # bytes of the level-2 cache
    cache_size: float  # bytes that are found there again
    half: float  # operations of 16-bit matrix instructions in the weight-only kernel
    int8: float  # operations of int8 ones in the largest tile of the int8 product
    multiprocessors: int
    clock: float
    has_wgmma: bool = False

    @property
    def issued(self) -> float:
        """Instructions of warps."""
        return self.multiprocessors * 4 * self.clock


# H200, A100, RTX 5090, T4; peaks of data sheets times the share that mma.sync reaches of them.
DEVICES = (
    Device(75, 0.27e6, 1.2e6, 3e6, 0, 0.45 * 130e6, 40, 1.2e3),
    Device(80, 1.75e6, 4.0e6, 32e6, 0.70 * 312e6, 0.68 * 624e6, 108, 1.41e3),
    Device(90, 4.30e6, 5.5e6, 40e6, 0.55 * 990e6, 0.54 * 1979e6, 132, 1.83e3, has_wgmma=True),
    Device(120, 1.50e6, 5.0e6, 80e6, 0.70 * 210e6, 0.68 * 838e6, 170, 2.40e3),
)


def overlapped(a: float, b: float) -> float:
    """The time of two things at once, of which the longer hides most of the other."""
    return max(a, b) + 0.15 * min(a, b)


def weight_only(device: Device, by_mma: bool, n: int, k: int, m: int) -> float:
    """Microseconds of one launch: by matrix instructions, in tiles of up to 64 rows, or by dot products of 4."""
    codes = n * k / 2048
    if by_mma:
        rows = next(rows for rows in (8, 16, 32, 64) if m <= rows or rows == 64)
        tiles = math.ceil(m / rows)
        issued = codes * tiles * {8: 179, 16: 194, 32: 215, 64: 259}[rows]
        busy = 0.6 * 2 * rows * tiles * n * k / device.half + issued / (0.6 * device.issued)
        read = n * k + 2 * m * (k + n)
    else:
        issued = codes * (m // 4 * 600 + {0: 0, 1: 330, 2: 420, 3: 600}[m % 4])
        busy, read = issued / (0.7 * device.issued), n * k * math.ceil(m / 4) + 4 * m * (k + n)
    return 1.5 * LAUNCH + overlapped(read / (0.88 * device.memory), busy)


def int8(device: Device, by_mma: bool, n: int, k: int, m: int) -> float:
    """Microseconds of three launches: outlier columns, codes, and the product with what follows it."""
    size = (2 if by_mma or device.architecture < 80 else 4) * m * k
    read = size / (device.cache if size < device.cache_size / 2 else device.memory)
    mark = LAUNCH + 0.4 + 1.15 * read
    quantize = LAUNCH + 0.9 + 1.2 * (read + m * k / device.memory)
    product = []
    for rows, cols, share in (*TILES, *(GROUP_TILES if device.has_wgmma else ())):
        tiles = math.ceil(m / rows) * math.ceil(n / cols)
        waves = tiles / device.multiprocessors
        # Small tiles share the depth where there are few of them.
        used = 0.85 if waves < 1 and rows == 64 else waves / math.ceil(waves) if waves < 4 else 1.0
        busy = 1.03 * 2 * math.ceil(m / rows) * rows * n * k / (device.int8 * share * used)
        product.append(overlapped(busy, (n * k + m * k + 2 * m * n) / device.memory))
    return mark + quantize + min(product)


def most_rows(slow: Callable[[int], float], fast: Callable[[int], float]) -> int:
    """The most rows for the weight-only path, whose times are `slow`, beside those of the int8 path.

    Of ROWS, where the worst is least: what the other path would save at any m, and what a row more costs at the change.
    What is within WORTH counts as equal, and of equals the most rows are taken.
    """
    ways = {m: (slow(m), fast(m)) for m in POINTS}

    def worst(most: int) -> float:
        kept = max((own / other for m, (own, other) in ways.items() if m <= most), default=0.0)
        given_up = max(other / own for m, (own, other) in ways.items() if m > most)
        step = ways[most + 1][1] / ways[most][0] if most > 0 else 0.0
        return max(WORTH, kept, step, given_up)

    return min(reversed(ROWS), key=worst)


def modelled(devices: Iterable[Device] = DEVICES) -> dict[tuple[int, bool], list[list[int]]]:
    """By architecture, and whether matrix instructions do it: a row for each k, a column for each n."""
    found = {}
    for device in devices:
        for by_mma in (False, True) if device.half else (False,):
            slow, fast = partial(weight_only, device, by_mma), partial(int8, device, by_mma)
            rows = [[most_rows(partial(slow, n, k), partial(fast, n, k)) for n in EXTENTS] for k in EXTENTS]
            found[device.architecture, by_mma] = rows
    return found


def nearest(extent: int) -> int:
    """The place of an extent in EXTENTS."""
    return min(max(round(math.log2(extent)), 9), 15) - 9


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

// Rows by k, columns by n: powers of two from 2^first_extent on.
inline constexpr int first_extent = {EXTENTS[0].bit_length() - 1};
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
    found, sources = modelled(), ["the model"]
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
