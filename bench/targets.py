"""How fast octavo is meant to be, and how fast it is: a table of targets, each measured, with pass or miss.

    cmake --preset release -DOCTAVO_BENCH=ON && cmake --build --preset release        # once
    .venv/bin/python bench/targets.py --output bench/results/targets
    OCTAVO_CPU_ISA=avx512_vnni ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 \
        .venv/bin/python bench/targets.py --output bench/results/targets-vnni    # as a machine without AMX

One thread, bfloat16 in and out, 6 outlier columns unless a line says otherwise. Within a shape all contenders take
turns (bench/linear.py); results are checked before anything is timed. What the machine can do is measured in the same
run by the C++ benchmarks, right beside each product: the instruction peak by bench_gemm, the read bandwidth by
bench_linear. bench_machine's figures head the table. Where those are not built, their lines say so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from octavo_bench.measuring.options import wait_passively

wait_passively()

import octavo
import torch
from contenders import (
    BFLOAT16,
    BITSANDBYTES,
    BITSANDBYTES_PLAIN,
    FLOAT32,
    OCTAVO,
    check,
    contenders,
    prepare,
    problem,
)
from measure import Others, Spread, machine, set_threads, spreads, take_turns, taken, write
from tqdm import tqdm

OUTLIERS = 6
BANDWIDTH = 85.0  # per cent of the read bandwidth, at m = 1 with the largest weight
PEAK = 90.0  # per cent of the vpdpbusd peak, of the product alone
OVER_BITSANDBYTES = 2.0
DECOMPOSITION = 1.10  # times as long with outlier columns as without, at most, from 16 rows on
SCALING = 1.85  # two threads over one at 512 rows


@dataclass(frozen=True)
class Shape:
    """A product and how many times as fast as torch's linear it is to be."""

    k: int
    n: int
    m: int
    over_bfloat16: float
    over_float32: float


SHAPES = (
    Shape(4096, 4096, 512, 1.95, 4.6),
    Shape(2048, 8192, 512, 1.95, 4.6),
    Shape(768, 3072, 512, 1.9, 5.5),
    Shape(4096, 16384, 16, 2.8, 9),
    Shape(2048, 8192, 16, 2.6, 8),
    Shape(768, 3072, 16, 2, 5),
    Shape(4096, 16384, 1, 3, 3),
    Shape(2048, 8192, 1, 3, 3),
    Shape(768, 3072, 1, 2.5, 2.5),
)
LARGEST = (4096, 16384, 1)  # whose weight the bandwidth is measured with
GEMM = (4096, 4096, 512)


@dataclass
class Line:
    """A target and what was measured; `measured` is None where nothing was, and `note` says why."""

    shape: str
    what: str
    limit: float
    measured: float | None
    at_most: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def verdict(self) -> str:
        """One of "pass", "MISS", "not measured"."""
        if self.measured is None:
            return "not measured"
        return "pass" if (self.measured <= self.limit if self.at_most else self.measured >= self.limit) else "MISS"


@dataclass
class Measured:
    """The times of one shape by contender and number of outlier columns ("octavo int8, 0")."""

    shape: Shape
    times: dict[str, Spread]
    left_out: dict[str, str]
    scaling: dict[str, Spread]  # of octavo, "1 thread" and "2 threads"; empty where not measured
    others: float | None = None  # cores that other programs took while `scaling` was measured

    def ratio(self, peer: str, own: str) -> float | None:
        """How many times as long as `own` the `peer` takes."""
        if peer not in self.times or own not in self.times:
            return None
        return self.times[peer].median / self.times[own].median


def main(words: Sequence[str] | None = None, shapes: Sequence[Shape] = SHAPES) -> int:
    """Measure, print the table, write it as Markdown and JSON. Returns 0, also where targets are missed."""
    args = arguments(words)
    set_threads(1)
    facts = machine(1)
    others = Others()
    roofs = [roof(args.binaries)]
    measured = []
    with torch.no_grad(), tqdm(shapes, unit="shape", file=sys.stderr, disable=None) as bar:
        for shape in bar:
            bar.set_description(f"k={shape.k} n={shape.n} m={shape.m}")
            measured.append(measure(shape, args.seconds))
    products = run_benchmark(args.binaries, "bench_gemm", "int8_matmul/k:{}/n:{}/m:{}/.*".format(*GEMM), repetitions=5)
    pattern = "linear/k:{}/n:{}/m:{}/outliers:{}/.*".format(*LARGEST, OUTLIERS)
    layers = run_benchmark(args.binaries, "bench_linear", pattern, repetitions=5)
    roofs.append(roof(args.binaries))
    facts["cores_taken_by_others"] = others.cores()
    lines = [
        gemm_line(products),
        bandwidth_line(layers),
        *(line for each in measured for line in shape_lines(each)),
    ]
    text = markdown(lines, facts, roofs)
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(["bench/targets.py", *(sys.argv[1:] if words is None else words)]),
        "machine": facts,
        "lines": [asdict(line) | {"verdict": line.verdict} for line in lines],
        "measured": [asdict(each) for each in measured],
        "bench_machine": roofs,
        "bench_gemm": products,
        "bench_linear": layers,
    }
    write(args.output / "targets.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    write(args.output / "targets.md", lambda path: path.write_text(text + "\n"))
    return 0


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each shape, all contenders together")
    parser.add_argument("--binaries", type=Path, default=Path("build/release/bench"), metavar="DIR",
                        help="where the C++ benchmarks are (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("build/bench"), metavar="DIR")
    return parser.parse_args(words)


def measure(shape: Shape, seconds: float) -> Measured:
    """Check, then time, octavo and its peers, with outlier columns and without, and octavo with two threads."""
    every = contenders()
    chosen = {name: every[name] for name in (OCTAVO, BFLOAT16, FLOAT32, BITSANDBYTES, BITSANDBYTES_PLAIN)}
    calls = {}
    left_out: dict[str, str] = {}
    given = {outliers: problem(shape.k, shape.n, shape.m, outliers) for outliers in (OUTLIERS, 0)}
    layers, missing = prepare(chosen, given[OUTLIERS].weight)
    for outliers, part in given.items():
        left_out |= {f"{name}, {outliers}": why for name, why in missing.items()}
        for name, layer in layers.items():
            _, why = check(chosen[name], layer, part)
            if why:
                left_out[f"{name}, {outliers}"] = why
            else:
                calls[f"{name}, {outliers}"] = partial(layer, part.x.to(chosen[name].dtype))
    times = spreads(take_turns(calls, seconds)) if calls else {}
    scaling: dict[str, Spread] = {}
    busy: float | None = None
    own = calls.get(f"{OCTAVO}, {OUTLIERS}")
    if shape.m == 512 and own and (os.cpu_count() or 1) >= 2:
        threads = {"1 thread": 1, "2 threads": 2}

        def ready(name: str) -> None:
            """The threads are started, and have been used once, before a call is timed."""
            octavo.set_num_threads(threads[name])
            own()

        others = Others()
        scaling = spreads(take_turns(dict.fromkeys(threads, own), seconds / 4, ready))
        busy = others.cores()
        octavo.set_num_threads(1)
    return Measured(shape, times, left_out, scaling, busy)


def shape_lines(measured: Measured) -> list[Line]:
    """All targets that concern a shape."""
    shape = measured.shape
    where = f"{shape.k}, {shape.n}, {shape.m}"
    with_outliers, without = f"{OCTAVO}, {OUTLIERS}", f"{OCTAVO}, 0"

    def over(peer: str, outliers: int, limit: float) -> Line:
        key = f"{peer}, {outliers}"
        found = measured.ratio(key, f"{OCTAVO}, {outliers}")
        what = f"over {peer}" + ("" if outliers else ", no outlier columns")
        note = measured.left_out.get(key) or measured.left_out.get(f"{OCTAVO}, {outliers}") or ""
        return Line(where, what, limit, found, note=note)

    lines = [
        over(BFLOAT16, OUTLIERS, shape.over_bfloat16),
        over(FLOAT32, OUTLIERS, shape.over_float32),
        over(BFLOAT16, 0, 1),
        over(FLOAT32, 0, 1),
        *(over(peer, o, OVER_BITSANDBYTES) for peer in (BITSANDBYTES, BITSANDBYTES_PLAIN) for o in (OUTLIERS, 0)),
    ]
    if shape.m >= 16:
        cost = measured.ratio(with_outliers, without)
        what = f"time with {OUTLIERS} outlier columns over none"
        lines.append(
            Line(where, what, DECOMPOSITION, cost, at_most=True, note=measured.left_out.get(with_outliers, ""))
        )
    if shape.m == 512:
        found = None
        if measured.scaling:
            found = measured.scaling["1 thread"].median / measured.scaling["2 threads"].median
        note = measured.left_out.get(with_outliers, "this machine has one core")
        if found:
            note = taken(measured.others)  # a core that others use cannot be gained
        lines.append(Line(where, "two threads over one", SCALING, found, note=note))
    return lines


def bandwidth_line(layers: dict[str, Any]) -> Line:
    """The weight's bytes per second, against a sum of as many bytes read right after, as bench_linear finds them.

    Not of the calls that are timed beside the peers: those come to a weight that the peers' weights have pushed out of
    the caches, and a sum that is repeated by itself does not.
    """
    what = "of the read bandwidth of a buffer of the weight's size"
    line = Line("{}, {}, {}".format(*LARGEST), what, BANDWIDTH, None, unit=" %")
    name = "linear/k:{}/n:{}/m:{}/outliers:{}/real_time_median".format(*LARGEST, OUTLIERS)
    line.measured = counter(layers, name, "%bandwidth")
    rate = counter(layers, name, "GB/s")
    line.note = f"{rate:.1f} GB/s" if rate is not None else absent([layers])
    return line


def gemm_line(products: dict[str, Any]) -> Line:
    """The int8 product alone against the instruction's peak."""
    line = Line("{}, {}, {}".format(*GEMM), "product alone, of the vpdpbusd peak", PEAK, None, unit=" %")
    # The median over the repetitions; google-benchmark names it so.
    name = "int8_matmul/k:{}/n:{}/m:{}/real_time_median".format(*GEMM)
    line.measured = counter(products, name, "%vpdpbusd_zmm")
    rate = counter(products, name, "GOPS")
    line.note = f"{rate:.0f} GOPS" if rate is not None else absent([products])
    tiles = counter(products, name, "%tdpbssd")
    if octavo.info()["cpu"]["instruction_set"] == "amx" and tiles is not None:
        line.note += f", {tiles:.0f} % of the tdpbssd peak"
    if rate is not None and line.measured is None:
        line.note += "; this processor has no AVX512-VNNI"
    return line


def roof(binaries: Path) -> dict[str, Any]:
    """What bench_machine measures."""
    return run_benchmark(binaries, "bench_machine", ".*", repetitions=3)


def best(roofs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The largest rates, by benchmark and counter, of all repetitions of bench_machine."""
    rates: dict[str, dict[str, float]] = {}
    for benchmark in (each for report in roofs for each in report.get("benchmarks", [])):
        if benchmark.get("run_type") != "aggregate":
            own = rates.setdefault(benchmark["name"], {})
            for key in {"GHz", "GOPS", "GB/s"} & set(benchmark):
                own[key] = max(own.get(key, 0.0), benchmark[key])
    return rates


def run_benchmark(binaries: Path, name: str, pattern: str, repetitions: int = 1) -> dict[str, Any]:
    """The JSON that a C++ benchmark writes, or {"absent": reason}."""
    binary = binaries / name
    if not binary.is_file():
        return {"absent": f"{binary} is not built: cmake --preset release -DOCTAVO_BENCH=ON needs libbenchmark-dev"}
    command = [str(binary), f"--benchmark_filter={pattern}", f"--benchmark_repetitions={repetitions}",
               "--benchmark_format=json", "--benchmark_min_time=0.2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0:
        return {"absent": f"{binary} failed: {result.stderr.strip() or result.returncode}"}
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def counter(report: dict[str, Any], name: str, key: str) -> float | None:
    """A counter of one benchmark of a report."""
    for benchmark in report.get("benchmarks", []):
        if benchmark["name"] == name and key in benchmark:
            return float(benchmark[key])
    return None


def absent(reports: list[dict[str, Any]]) -> str:
    """Why C++ benchmarks gave no number."""
    return next((report["absent"] for report in reports if "absent" in report), "no such benchmark in the report")


def markdown(lines: list[Line], facts: dict[str, Any], roofs: list[dict[str, Any]]) -> str:
    """The table, under what it was measured on."""
    settings = " ".join(f"{name}={value}" for name, value in facts["environment"].items() if value)
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    text = [
        f"{facts['cpu']}, {facts['cores']} cores; octavo runs {facts['instruction_set']}; {settings}; {versions}; "
        f"{taken(facts['cores_taken_by_others'])}; commit {facts['commit']}; {facts['date']}",
        "",
    ]
    for name, rates in best(roofs).items():
        text.append(f"- {name}: " + ", ".join(f"{rate:.4g} {key}" for key, rate in sorted(rates.items())))
    if "absent" in roofs[-1]:
        text.append(f"- {roofs[-1]['absent']}")
    text += ["", "| k, n, m | what | target | measured | |", "|---|---|---|---|---|"]
    for line in lines:
        sign = "<=" if line.at_most else ">="
        value = "" if line.measured is None else f"{line.measured:.3g}{line.unit}"
        verdict = line.verdict + (f" ({line.note})" if line.note else "")
        text.append(f"| {line.shape} | {line.what} | {sign} {line.limit:g}{line.unit} | {value} | {verdict} |")
    verdicts = [line.verdict for line in lines]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in ("pass", "MISS", "not measured"))
    return "\n".join([*text, "", counts])


if __name__ == "__main__":
    sys.exit(main())
