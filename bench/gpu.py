"""Time the int8 linear layer against its peers on a GPU, in one run and one process.

    python bench/gpu.py --output bench/results --seconds 240
    python bench/gpu.py --plan            what would be measured, without a GPU

For each shape (the GPT-3 family of the paper's Table 5, Llama's layers) and number of outlier columns, X and W in
float16: octavo with its defaults; its int8 path and its weight-only path alone; torch's linear;
bitsandbytes' `Linear8bitLt` where it is installed. First come three cases in which octavo does something else: one
scale for all of X, rows that are not aligned, and zeropoint.

As in `octavo bench` each result is checked before anything is timed, and the contenders take turns, each call on a cold
level-2 cache. A wrong or missing result of octavo's makes the status 1. Written to OUTPUT as <gpu>-<date>.json, after
every shape anew, with the shares of the memory bandwidth, by a copy of a gigabyte, and of the int8 peak, by a product
of 8192 in each direction.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import octavo
import torch
from octavo_bench.commands import count, positive
from octavo_bench.layers import contenders as known
from octavo_bench.layers.contest import LATE, OCTAVO, Case, Contender, measure
from octavo_bench.machine import LAYERS, Facts
from octavo_bench.models.variants import reason
from octavo_bench.progress import Progress
from octavo_bench.tables import Cell, Report, Table, write_text
from octavo_bench.turns import Call, Evict, on_the_gpu

GPT3_WIDTHS = (768, 1024, 2048, 2560, 4096, 5120, 12288)  # Table 5: k = w, n = 4 w and back
LLAMA = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192))
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
OUTLIERS = (0, 6, 64)
FLOAT16 = "torch float16"
OWN = (OCTAVO, known.INT8_PATH, known.WEIGHT_ONLY, "all")

Kind = tuple[Literal["absmax", "zeropoint"], Literal["tensor", "vector"]]
USUAL: Kind = ("absmax", "vector")
VARIANTS: tuple[tuple[Kind, Case], ...] = (
    (("absmax", "tensor"), Case(4096, 16384, 256, 6)),
    (USUAL, Case(4098, 16384, 256, 6)),
    (("zeropoint", "vector"), Case(4096, 16384, 256, 6)),
)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it. Returns the exit status."""
    args = arguments(words)
    groups = plan(args)
    if args.plan:
        for kind, cases in groups:
            for case in cases:
                print(f"k={case.k} n={case.n} m={case.m} outliers={case.outliers} {variant(kind)}".rstrip())
        return 0
    if not torch.cuda.is_available():
        print("bench/gpu.py: no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    if "cuda" not in octavo.info()["backends"]:
        print(f"bench/gpu.py: {octavo.info()['cuda']['missing']}", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + args.seconds
    command = shlex.join(["bench/gpu.py", *(sys.argv[1:] if words is None else words)])
    facts = Facts(command, torch.get_num_threads(), LAYERS)
    gpu = torch.cuda.get_device_name()
    evict = Evict(4 * torch.cuda.get_device_properties(0).L2_cache_size, "cuda")
    ceilings = {"bytes_per_second": bandwidth(evict), "int8_operations_per_second": int8_peak(evict)}
    path = args.output / f"{'-'.join(re.findall('[a-z0-9]+', gpu.lower()))}-{time.strftime('%Y-%m-%d')}.json"
    args.output.mkdir(parents=True, exist_ok=True)
    report = Report(f"The linear layer on {gpu}", {}, [])
    progress = Progress()
    progress.begin(len(groups))
    for kind, cases in groups:
        with progress.step(f"k={cases[0].k} n={cases[0].n} {variant(kind)}"):
            measure_group(kind, cases, args.calls, evict, deadline)
        done = facts.now(gpu=gpu, cuda=torch.version.cuda, octavo_info=octavo.info(), **ceilings)
        report = Report(report.title, done, [table(groups, ceilings)])
        write_text(path, report.json())
    progress.close()
    print(report.text())
    return status([case for _, cases in groups for case in cases])


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=positive, nargs="*", default=GPT3_WIDTHS, help="w: k x n is w x 4w and 4w x w")
    parser.add_argument("--no-llama", action="store_true", help="without Llama's shapes")
    parser.add_argument("--no-variants", action="store_true", help="without the three cases of other kinds")
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="tokens m")
    parser.add_argument("--outliers", type=count, nargs="+", default=OUTLIERS, help="outlier columns of X")
    parser.add_argument("--calls", type=partial(count, least=2), default=15, help="of each contender in each case")
    parser.add_argument("--seconds", type=float, default=240.0, help="what is not reached until then is left out")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), metavar="DIR")
    parser.add_argument("--plan", action="store_true", help="print the cases and measure nothing")
    args = parser.parse_args(words)
    pairs = [pair for w in args.widths for pair in ((w, 4 * w), (4 * w, w))]
    args.shapes = list(dict.fromkeys([*pairs, *(() if args.no_llama else LLAMA)]))
    if not args.shapes or max(args.outliers) > min(k for k, _ in args.shapes):
        parser.error("expected shapes, and no more --outliers than the least k")
    return args


def plan(args: argparse.Namespace) -> list[tuple[Kind, list[Case]]]:
    """The cases asked for, those that share a weight together."""
    groups = [(USUAL, [Case(k, n, m, o) for m in args.rows for o in args.outliers]) for k, n in args.shapes]
    return [*(() if args.no_variants else [(kind, [case]) for kind, case in VARIANTS]), *groups]


def variant(kind: Kind) -> str:
    """How octavo's weight is not the usual one."""
    return ", ".join(word for word in kind if word not in USUAL)


def contenders(kind: Kind, device: str) -> dict[str, Contender]:
    """All of them; bitsandbytes' layer for a GPU is another one than that for the CPU."""
    peers = known.of_bitsandbytes(known.THRESHOLD) if device == "cuda" else {}
    return {**known.paths_of_octavo(*kind), **known.of_torch(["float16"]), **peers}


def measure_group(
    kind: Kind, cases: list[Case], calls: int, evict: Evict, deadline: float, device: str = "cuda"
) -> None:
    """Measure cases that share a weight. What goes wrong, want of memory above all, costs them alone."""
    options: dict[str, Any] = {"before": evict, "device": device, "rounds": (calls, calls), "deadline": deadline}
    if device == "cuda":
        options["clock"] = on_the_gpu
    try:
        with torch.inference_mode():
            measure(cases, contenders(kind, device), 0, **options)
    except Exception as error:  # an error of the device: the results so far are written all the same
        for case in cases:
            if not case.times:
                case.left_out.setdefault("all", reason(error))
    if device == "cuda":
        torch.cuda.empty_cache()
        octavo.release_cuda_memory()


def status(cases: Sequence[Case]) -> int:
    """1 where a result of octavo's was wrong or missing for another reason than time, else 0."""
    return int(any(name in OWN and why != LATE for case in cases for name, why in case.left_out.items()))


def best(call: Call, evict: Evict, calls: int = 10) -> float:
    """Seconds of the fastest of some calls, after two to warm up."""
    times = []
    for _ in range(calls + 2):
        evict("")
        times.append(on_the_gpu(call))
    return 1e-3 * min(times[2:])


def bandwidth(evict: Evict) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / best(lambda: target.copy_(source), evict)


def int8_peak(evict: Evict) -> float:
    """Operations per second of a large int8 product, of torch's or octavo's whichever is faster."""
    size = 8192
    a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (size, size), dtype=torch.int8, device="cuda")
    seconds = min(best(lambda: torch._int_mm(a, b.t()), evict), best(lambda: octavo.int8_matmul(a, b), evict))
    return 2 * size**3 / seconds


def table(groups: Sequence[tuple[Kind, Sequence[Case]]], ceilings: dict[str, float]) -> Table:
    """A row for each case; in the note in how many cases octavo is faster than each peer, and where it is slowest."""
    names = [*OWN[:-1], FLOAT16, known.BITSANDBYTES]
    rows: list[list[Cell]] = []
    for kind, cases in groups:
        for case in cases:
            own, peer = case.times.get(OCTAVO), case.times.get(FLOAT16)
            shares: list[Cell] = [None] * 5
            if own:
                seconds, moved = 1e-3 * own.median, case.n * case.k + 2 * case.m * (case.k + case.n)
                operations = 2 * case.m * case.n * case.k / seconds
                shares = [
                    1e3 * own.lower, 1e3 * own.upper, peer.median / own.median if peer else None,
                    100 * moved / seconds / ceilings["bytes_per_second"],
                    100 * operations / ceilings["int8_operations_per_second"],
                ]  # fmt: skip
            medians = [1e3 * case.times[name].median if name in case.times else None for name in names]
            where = f"{case.k} x {case.n} {variant(kind)}".rstrip()
            rows.append([where, case.m, case.outliers, *medians, *shares])
    every = [case for _, cases in groups for case in cases]
    words = []
    for name in (FLOAT16, known.BITSANDBYTES):
        ratios = [ratio for case in every if (ratio := case.ratio(name)) is not None]
        if ratios:
            faster = f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} cases; lowest ratio {min(ratios):.2f}."
            words.append(f"octavo is faster than {name} in {faster}")
    reasons = {f"Left out: {name}: {reason}." for case in every for name, reason in case.left_out.items()}
    us = {f"{name}, us": ".1f" for name in names}
    shares_of = {"octavo's quartiles, us": ".1f", "upper": ".1f", "times as fast as float16": ".2f"}
    shares_of |= {"bandwidth, %": ".0f", "int8 peak, %": ".0f"}
    columns = {"k x n": "", "m": "d", "outlier columns": "d", **us, **shares_of}
    return Table("Medians of a call", columns, rows, " ".join([*words, *sorted(reasons)]))


if __name__ == "__main__":
    sys.exit(main())
