"""Up to how many rows the path `auto` leaves X as it is on a GPU: python -m octavo_bench.layers.selection [RESULTS].

Writes cuda/selection_table.hpp. By itself it is made by a model of time: bytes over bandwidths, instructions as the
machine code has them (.ci/cuda_bounds.txt), products over shares of the peak, divided among multiprocessors as
cuda/division.hpp does. Results of `octavo bench --device cuda --json` replace the model where they measured: at the
extents of the table that are nearest to theirs.

Weight-only is preferred as long as the int8 product is not a tenth faster: it rounds no activations, and the model is
no better than that. Beyond that a row more should make no layer more than STEP times slower.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import tables
from .contenders import PATHS

Counts = npt.NDArray[np.int64]  # of rows of X
Times = npt.NDArray[np.floating[Any]]

TABLE = Path(__file__).resolve().parents[3] / "cuda" / "selection_table.hpp"
EXTENTS = [round(2 ** (i / 2)) for i in range(18, 31)]  # k and n; what is between or beyond counts as the nearest
ROWS = (*range(65), *range(72, 256, 8), *range(256, 4097, 64))
# Where times can have a step: up to 512 every row counts, then those of tiles.
POINTS = np.array(sorted({*range(1, 513), *(m for edge in range(512, 4097, 16) for m in (edge, edge + 1))}))
NEXT = np.flatnonzero(np.diff(POINTS) == 1) + 1  # the places of those that have the row before
WORTH = 1.1  # as many times as long as the int8 product may take what rounds no activations
STEP = 1.3
LAUNCH = 2.0  # microseconds until the first block starts and after the last has ended; between launches, half of it
OUTLIERS = 6
# cuda/division.hpp: rows, columns, rows that are seen to be absent, what it reaches of `Device.int8`.
GROUP_TILES = ((128, 256, 64, 1.15), (128, 128, 64, 1.04))
TILES = ((256, 128, 16, 1.0), (128, 128, 16, 0.95), (128, 64, 16, 0.65), (64, 64, 16, 0.6))
ROWS_MORE, COLUMNS_OF_PART, MOST_PARTS, LEAST_SLICES = 24.0, 256.0, 16, 8
BYTES_OF_LAUNCH, MOST_SPLIT, LEAST_WORK, WORK_OF_ROW = 3.5e6, 32, 0.5, 0.0125


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
    shared: int  # bytes of shared memory that a block can have
    has_wgmma: bool = False

    @property
    def issued(self) -> float:
        """Instructions of warps."""
        return self.multiprocessors * 4 * self.clock


# H200, A100, RTX 5090, T4; peaks of data sheets times the share that mma.sync reaches of them.
DEVICES = (
    Device(75, 0.27e6, 1.2e6, 3e6, 0, 0.45 * 130e6, 40, 1.2e3, 65536),
    Device(80, 1.75e6, 4.0e6, 32e6, 0.70 * 312e6, 0.68 * 624e6, 108, 1.41e3, 166912),
    Device(90, 4.30e6, 5.5e6, 40e6, 0.55 * 990e6, 0.54 * 1979e6, 132, 1.83e3, 232448, has_wgmma=True),
    Device(120, 1.50e6, 5.0e6, 80e6, 0.70 * 210e6, 0.68 * 838e6, 170, 2.40e3, 101376),
)


def whole(count: npt.NDArray[np.int64] | int, size: npt.NDArray[np.int64] | int) -> Counts:
    """How many of a size cover the count."""
    return np.asarray(-(-count // size))


def overlapped(a: Times, b: Times) -> Times:
    """The time of two things at once, of which the longer hides most of the other."""
    return np.maximum(a, b) + 0.15 * np.minimum(a, b)


@dataclass
class Split:
    """How the weight-only product is divided (cuda/division.hpp): for each number of rows."""

    cost: Times  # bytes that could be read meanwhile, with what a launch more costs
    read: Times  # without
    warps: Counts
    parts: Counts
    blocks: Counts  # of all parts


def split_weight_only(device: Device, n: int, k: int, m: Counts, tile: int, resident: int, most: int) -> Split:
    """As split_weight_only of cuda/division.hpp."""
    count, one = device.multiprocessors, np.ones(m.shape, np.int64)
    best = Split(np.full(m.shape, np.inf), np.full(m.shape, np.inf), one, one, one)
    for warps in (1, 2, 4, 8):
        if warps > most or (warps > 1 and warps * 64 >= k + 64):
            break
        blocks, steps = whole(m, tile) * whole(n, 256 // warps), max(int(whole(k, 64 * warps)), 1)
        limit = np.where(blocks < count, np.clip(2 * count // blocks, 1, MOST_SPLIT), 1)
        for parts in range(1, int(limit.max()) + 1):
            own = int(whole(steps, parts))
            if parts > 1 and int(whole(steps, own)) != parts:
                continue
            all_blocks = blocks * parts
            last = all_blocks % (count * resident)
            waves = all_blocks - last + np.where(last > 0, np.maximum(last, count * 2 / 3), 0)
            of_most = whole(all_blocks, count) * count / all_blocks
            work = (LEAST_WORK + WORK_OF_ROW * tile) * n * k * whole(m, tile) * of_most
            read = (n * k + 2 * np.minimum(m, tile) * k * blocks) * waves / all_blocks * own * parts / steps
            more = BYTES_OF_LAUNCH + 8 * parts * m * n if parts > 1 else 0.0
            cost = np.where(parts <= limit, overlapped(read, work) + more, np.inf)
            better = cost < best.cost
            for name, value in (("cost", cost), ("read", read), ("blocks", all_blocks)):
                setattr(best, name, np.where(better, value, getattr(best, name)))
            best.warps, best.parts = np.where(better, warps, best.warps), np.where(better, parts, best.parts)
    return best


def by_matrix_instructions(device: Device, n: int, k: int, m: Counts) -> Times:
    """Microseconds of the weight-only product in tiles of 8 to 64 rows."""
    found = np.zeros(m.shape)
    for tile, issued, resident in ((8, 179, 2), (16, 194, 2), (32, 215, 2), (64, 259, 1)):
        needed = {warps: 4 * (16384 + tile * (warps * 128 + 16)) + 4 * tile for warps in (1, 2, 4, 8)}
        most = max((warps for warps, size in needed.items() if size <= device.shared), default=0)
        if most == 0:
            break
        split = split_weight_only(device, n, k, m, tile, resident, most)
        tiles = whole(m, tile)
        work = 0.6 * 2 * tile * tiles * n * k / device.half + n * k / 2048 * tiles * issued / (0.6 * device.issued)
        of_most = whole(split.blocks, device.multiprocessors) * device.multiprocessors / split.blocks
        time = 1.5 * LAUNCH + overlapped(split.read / (0.88 * device.memory), work * of_most)
        added = 0.5 * LAUNCH + 0.5 + 8 * split.parts * m * n / device.cache
        found = np.where((m > tile // 2) | (tile == 8), time + np.where(split.parts > 1, added, 0.0), found)
    return found


def weight_only(device: Device, by_mma: bool, n: int, k: int, m: Counts) -> Times:
    """Microseconds: by matrix instructions, or by dot products of up to 4 rows."""
    if by_mma:
        return by_matrix_instructions(device, n, k, m)
    tiles = whole(m, 4)
    issued = n * k / 2048 * np.where(m == 1, 330, np.where(m == 2, 420, 600 * tiles))
    blocks = tiles * int(whole(n, 4))
    of_one = whole(blocks, device.multiprocessors)
    # A block by itself waits more; of two that share a multiprocessor one computes while the other waits.
    turns = of_one // 2 * 2 + np.where(of_one % 2 > 0, 1.4, 0.0)
    busy = issued / (0.7 * device.issued) * turns * device.multiprocessors / blocks
    # Blocks that read the same codes do so at the same time: from memory the first does.
    read = np.maximum((n * k + 4 * m * (k + n)) / (0.88 * device.memory), n * k * tiles / device.cache)
    return 1.5 * LAUNCH + overlapped(read / np.minimum(1.0, 1.5 * blocks / device.multiprocessors), busy)


def divide_product(device: Device, n: int, k: int, m: Counts, has_wgmma: bool) -> tuple[Times, Counts, Counts]:
    """The least cost, its tile, as in cuda/division.hpp, and how many blocks share the depth."""
    count, slices = device.multiprocessors, int(whole(k, 64))
    cost, tile_of, parts_of = np.full(m.shape, np.inf), np.zeros(m.shape, np.int64), np.ones(m.shape, np.int64)
    for number, (rows, cols, granule, rate) in enumerate((*GROUP_TILES, *TILES)):
        if number < len(GROUP_TILES) and not has_wgmma:
            continue
        across = int(whole(n, cols))
        full, present = m // rows * across, whole(m % rows, granule) * granule
        others = np.where(present > 0, across, 0)
        of_other = np.where(present == rows, 1.0, (ROWS_MORE + (rows - ROWS_MORE) * present / rows) / rows)
        for parts in range(1, MOST_PARTS + 1):
            own = int(whole(slices, parts))
            if parts > 1 and (own < LEAST_SLICES or int(whole(slices, own)) != parts):
                continue
            first, then = full * parts, others * parts
            idle = np.where(first % count > 0, count - first % count, 0)
            tiles = whole(first, count) + whole(np.maximum(then - idle, 0), count) * of_other
            columns = tiles * own * 64 + (COLUMNS_OF_PART * (parts + 1) if parts > 1 else 0.0)
            own_cost = columns * rows * cols / rate
            better = own_cost < cost
            cost = np.where(better, own_cost, cost)
            tile_of, parts_of = np.where(better, number, tile_of), np.where(better, parts, parts_of)
    return cost, tile_of, parts_of


def int8(device: Device, by_mma: bool, n: int, k: int, m: Counts) -> Times:
    """Microseconds of three launches: outlier columns, codes, and the product with what follows it."""
    size = (2 if by_mma or device.architecture < 80 else 4) * m * k
    kept = np.minimum(size, device.cache_size / 2)
    read = kept / device.cache + (size - kept) / device.memory
    mark = LAUNCH + 0.4 + 1.15 * read
    quantize = LAUNCH + 0.9 + 1.2 * (read + m * k / device.memory)
    cost, _, _ = divide_product(device, n, k, m, device.has_wgmma)
    busy = 1.03 * 2 * cost * device.multiprocessors / device.int8
    return mark + quantize + overlapped(busy, (n * k + m * k + 2 * m * n) / (0.88 * device.memory))


def taken(most: int, slow: Times, fast: Times) -> tuple[Times, Times, Times]:
    """What `auto` takes at POINTS, what a row more makes of that, and how far it is from the better path."""
    time = np.where(most >= POINTS, slow, fast)
    return time, time[NEXT] / time[NEXT - 1], time / np.minimum(slow, fast)


def most_rows(slow: Times, fast: Times) -> int:
    """The most rows for the weight-only path, whose times at POINTS are `slow`, beside those of the int8 path.

    Of ROWS, where the worst is least: what a row more costs, and what the other path would save. What is within STEP,
    and then what is within WORTH, counts as equal, and of equals the most rows are taken.
    """

    def worst(most: int) -> tuple[float, float]:
        _, steps, ratios = taken(most, slow, fast)
        far = float(ratios.max())
        return max(STEP, round(max(float(steps.max()), far), 2)), max(WORTH, far)

    return min(reversed(ROWS), key=worst)


def modelled(devices: Iterable[Device] = DEVICES) -> dict[tuple[int, bool], list[list[int]]]:
    """By architecture, and whether matrix instructions do it: a row for each k, a column for each n."""
    found = {}
    for device in devices:
        for by_mma in (False, True) if device.half else (False,):
            found[device.architecture, by_mma] = [
                [
                    most_rows(weight_only(device, by_mma, n, k, POINTS), int8(device, by_mma, n, k, POINTS))
                    for n in EXTENTS
                ]
                for k in EXTENTS
            ]
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
