"""What each kernel of a layer takes on a GPU: python -m octavo_bench.layers.kernels FILE.

Names tell which of cuBLASLt's was chosen. The level-2 cache is emptied before every call.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import octavo
import torch
from torch.profiler import ProfilerActivity, profile

from .contest import problem

SHAPES = ((4096, 16384), (768, 3072), (8192, 8192))
ROWS = (1, 16, 64, 128, 256, 1024, 4096)
BUFFER = 1 << 28  # bytes, more than the cache has
CALLS = 10
OUTLIERS = 6
FLUSH = "reduce_kernel"  # in the name of the kernel that empties the cache


def main(path: Path, device: str = "cuda") -> None:
    """Measure; the file is written after every shape anew."""
    buffer = torch.empty(BUFFER, dtype=torch.uint8, device=device)
    lines: list[str] = []
    for k, n in SHAPES:
        given = problem(k, n, max(ROWS), OUTLIERS, device)
        weight, x = given.weight.half(), given.x.half()
        int8 = octavo.quantize_weight(weight)
        for m in ROWS:
            rows = x[:m]
            calls = {
                "float16": partial(torch.nn.functional.linear, rows, weight),
                "auto": partial(octavo.linear, rows, int8),
                "int8": partial(octavo.linear, rows, int8, path="int8"),
            }
            for name, call in calls.items():
                lines.append(line(f"k={k} n={n} m={m} {name}", times(call, buffer.amax)))
        path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def times(call: Callable[[], object], flush: Callable[[], object]) -> dict[str, list[float]]:
    """Microseconds of every kernel that `call` launches, by name, in CALLS calls."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(CALLS):
            flush()
            call()
        torch.cuda.synchronize()
    return by_name(found.events())


def by_name(events: Iterable[Any]) -> dict[str, list[float]]:
    """The times of each kernel or copy on the GPU but of the one that empties the cache."""
    found = defaultdict(list)
    for event in events:
        if event.device_type.name == "CUDA" and FLUSH not in event.name:
            found[event.name].append(event.device_time)
    return dict(found)


def line(title: str, found: Mapping[str, list[float]]) -> str:
    """Of each kernel its name, the median of its times, and how often a call launches it."""
    parts = [f"{name[:90]} {statistics.median(own):.1f} us x{len(own) / CALLS:g}" for name, own in found.items()]
    return f"{title}: {'; '.join(parts)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
